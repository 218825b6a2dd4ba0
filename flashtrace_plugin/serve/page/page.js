// The live page: what the buttons do. Texts of the model and of files go into text nodes only.

import { append, compose, sample, written } from "./compose.js"
import { Refused, open, stream } from "./stream.js"
import * as text from "./text.js"

const $ = (id) => document.getElementById(id)
const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`)
const milliseconds = (ms) => (ms < 10_000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`)

let running = null // what can be aborted
let target = null // positions, a piece of the text, or the answer
let found = null
let foreign = null // the model of an opened attribution, where it is another

const info = await (await fetch("info")).json()
$("model").textContent = `${info.model.split("/").slice(-2).join("/")} on this server; nothing leaves it, and nothing is written unless you save`
$("method").replaceChildren(...info.methods.map((one) => {
  const option = new Option(one.name, one.name)
  option.title = one.summary
  return option
}))
const form = compose(info, () => {
  foreign = target = null
  document.body.classList.add("stale")
})

const status = (message) => { $("status").textContent = message }
const spoken = (message) => { $("spoken").textContent = message }
function wrong(message) {
  $("wrong").textContent = message
  $("wrong").hidden = !message
}

// Runs one request at a time: a new one takes the place of the one before.
async function run(path, data, what, tell) {
  running?.abort()
  const own = (running = new AbortController())
  wrong("")
  status(`${what} …`)
  $("stop").hidden = false
  try {
    await stream(path, data, own.signal, (event) => {
      if (own.signal.aborted) return
      if (event.event === "queue") status(`Waiting: ${event.ahead} before this`)
      else if (event.event === "started") status(`${what} …`)
      else tell(event)
    })
  } catch (error) {
    if (own.signal.aborted) return
    status("")
    if (!(error instanceof Refused)) throw error
    wrong(error.message)
  } finally {
    if (running === own) {
      running = null
      $("stop").hidden = true
    }
  }
}

async function letWrite() {
  let wrote = null
  form.fill({ ...sample(), generation: "", ids: null })
  foreign = null
  document.body.classList.add("stale")
  await run("write", sample(), "The model writes", (event) => {
    if (event.event === "written") return append(event.text)
    wrote = event
    written(event)
  })
  if (wrote === null) return
  $("wrote").textContent = `Wrote ${wrote.ids.length - wrote.prompt_length} tokens in ${milliseconds(wrote.ms)}${wrote.full ? ", the most it was allowed" : ""}`
  await explain(null)
}

function explain(where, extra = {}, save = null) {
  if (foreign !== null) return wrong(`This attribution is of another model, ${foreign}; edit the text to ask this one.`)
  target = where
  const asked = { ...sample(), target, method: $("method").value, ...extra }
  return run("explain", asked, "Looking for the sources", (event) => {
    if (event.event === "text") return shown(event)
    show(event)
    const passes = event.ms.passes ? `model pass ${milliseconds(event.ms.pass)}, ` : "no model pass, "
    status(`${event.method}: ${passes}hops ${milliseconds(event.ms.hops)}, of ${text.length().toLocaleString("en")} tokens`)
    save?.(event.attribution)
  })
}

let before = ""
function shown(event) {
  const now = JSON.stringify([event.tokens, event.prompt_length])
  if (now === before) return // the same text: what is selected and scrolled stays
  before = now
  found = null
  text.show(event)
}

function show(event) {
  found = event
  document.body.classList.remove("stale")
  $("save-attribution").disabled = false
  shade()
  const strongest = event.units.sentence.filter((unit) => unit.share > 0).sort((a, b) => b.share - a.share).slice(0, 3)
  $("question").textContent = `What led to “${event.target_text}”?`
  $("strongest").replaceChildren(...strongest.map((unit) => {
    const item = document.createElement("li"), share = document.createElement("span")
    share.className = "share"
    share.textContent = percent(unit.share)
    item.append(share, ` ${unit.text}`)
    return item
  }))
  $("notes").textContent = notes(event).join(" ")
  $("found").hidden = false
  table()
  spoken(strongest.length ? `Strongest source of ${event.target_text}: ${strongest[0].text}, ${percent(strongest[0].share)}` : "No source in the prompt")
}

function notes(event) {
  const told = []
  if (event.reasoning === null) told.push("No reasoning before this target was found, so it is explained directly.")
  else told.push(`Followed through the reasoning (underlined) in ${event.hops} ${event.hops === 1 ? "hop" : "hops"}.`)
  if (event.sink_share > 0) told.push(`${percent(event.sink_share)} of the mass lies on tokens that draw it whatever the target (struck through), which are not shaded.`)
  if (event.units.field === null && $("unit").value === "field") told.push("The prompt has fewer than two fields, or fields that cannot be told apart in it.")
  return told
}

function shade() {
  if (!found) return
  const unit = $("unit").value, units = unit === "token" ? null : found.units[unit]
  const values = units ? new Array(text.length()).fill(0) : found.values
  for (const one of units || []) values.fill(one.share || 0, ...one.tokens)
  if (units) for (const one of found.units.step) values.fill(one.share || 0, ...one.tokens)
  text.shade(values)
  if (found.reasoning) text.mark("thought", ...found.reasoning)
  text.mark("asked", ...found.target)
  for (const sink of found.sinks) document.querySelector(`[data-i="${sink}"]`)?.classList.add("sink")
}

function table() {
  const by = $("unit").value === "field" && found.units.field ? "field" : "sentence"
  const parts = { "": found.units[by], reasoning: by === "field" ? [] : found.units.step }
  const rows = Object.entries(parts).flatMap(([part, units]) => [...units].sort((a, b) => b.share - a.share).slice(0, 8).map((unit) => row(unit, part)))
  $("table-title").textContent = by === "field" ? "Messages and documents by share" : "Sentences by share"
  $("rows").replaceChildren(...rows)
  $("table").hidden = false
}

function row(unit, part) {
  const line = document.createElement("tr"), share = document.createElement("td"), where = document.createElement("td")
  const cell = document.createElement("td"), go = document.createElement("button")
  share.textContent = percent(unit.share || 0)
  where.textContent = part || unit.name || "prompt"
  go.type = "button"
  go.textContent = unit.text
  go.title = "Show it in the text"
  go.addEventListener("click", () => text.reveal(...unit.tokens))
  cell.append(go)
  line.append(share, where, cell)
  return line
}

function download(name, data) {
  const link = document.createElement("a")
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data)], { type: "application/json" }))
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000)
}

async function openFile(file) {
  wrong("")
  if (file.size > 32 * 2 ** 20) return wrong("The file is larger than 32 MB.")
  try {
    const opened = await open(await file.text())
    running?.abort()
    form.fill(opened.sample)
    if (info.methods.some((one) => one.name === opened.sample.method)) $("method").value = opened.sample.method
    foreign = opened.other_model ?? null
    target = opened.sample.target
    if (opened.found) {
      shown(opened.text)
      show(opened.found)
      status(foreign === null ? "A saved attribution; drag over words to ask further" : `A saved attribution of ${foreign}`)
    } else if (opened.sample.generation) await explain(target)
  } catch (error) {
    if (!(error instanceof Refused)) throw error
    wrong(error.message)
  }
}

$("write").addEventListener("click", letWrite)
$("explain").addEventListener("click", () => explain(null))
$("stop").addEventListener("click", () => {
  running?.abort()
  running = null
  $("stop").hidden = true
  status("Stopped")
})
$("method").addEventListener("change", () => { if (found) explain(target) })
$("unit").addEventListener("change", () => {
  if (!found) return
  shade()
  table()
  $("notes").textContent = notes(found).join(" ")
})
$("words").addEventListener("keydown", (event) => { if (event.key === "Enter" && event.target.value) explain(event.target.value) })
$("save-sample").addEventListener("click", () => download("sample.json", { format: "flashtrace-sample/1", model: info.model, ...sample(), target, method: $("method").value }))
$("save-attribution").addEventListener("click", () => explain(target, { full: true }, (saved) => download("attribution.json", saved)))
$("open").addEventListener("click", () => $("file").click())
$("file").addEventListener("change", () => {
  if ($("file").files.length) openFile($("file").files[0])
  $("file").value = ""
})
text.choosing((a, b) => {
  if (document.body.classList.contains("stale")) return wrong("The text has been edited since; explain the answer first, then choose words of it.")
  explain([a, b])
}, spoken)
document.body.dataset.ready = "yes"
