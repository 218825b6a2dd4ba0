// Asks the server. What it answers comes as lines of JSON; a request that is dropped cancels its job.

export class Refused extends Error {}

async function ask(path, data, signal) {
  let response
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: typeof data === "string" ? data : JSON.stringify(data),
      signal,
    })
  } catch (error) {
    throw lost(error)
  }
  if (response.ok) return response
  const told = await response.json().catch(() => ({}))
  throw new Refused(told.error || `the server answers ${response.status}`)
}

// Calls `tell(event)` for every event until the job has ended.
export async function stream(path, data, signal, tell) {
  const reader = (await ask(path, data, signal)).body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = "", ended = false
  for (;;) {
    let part
    try {
      part = await reader.read()
    } catch (error) {
      throw lost(error)
    }
    if (part.done) break
    const lines = (rest + part.value).split("\n")
    rest = lines.pop()
    for (const event of lines.map((line) => JSON.parse(line))) {
      if (event.event === "error") throw new Refused(event.message)
      ended = ended || event.event === "wrote" || event.event === "found"
      tell(event)
    }
  }
  if (!ended) throw new Refused("The server stopped before it was done. What you typed is still here; start it and ask again.")
}

export async function open(text) {
  return (await ask("open", text)).json()
}

function lost(error) {
  if (error.name === "AbortError") return error
  return new Refused("The server does not answer. What you typed is still here; start it again, and reload this page if its address has changed.")
}
