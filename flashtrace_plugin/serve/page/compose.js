// The left side: fields of the prompt and the answer. They outlive a reload of the tab, and nothing else.

const $ = (id) => document.getElementById(id)
const KEPT = "flashtrace-text"
const KINDS = { chat: ["user", "system", "assistant", "document"], plain: ["text", "document"] }

let exact = null // ids of the text as the model wrote it, until somebody edits it

export function compose(info, changed) {
  const edited = () => {
    exact = null
    keep()
    changed()
  }
  const chat = document.querySelector("[name=form][value=chat]")
  chat.disabled = !info.chat
  $("new-tokens").max = info.limits.new_tokens
  for (const radio of document.querySelectorAll("[name=form]")) {
    radio.addEventListener("change", () => { relabel(); edited() })
  }
  $("add-message").addEventListener("click", () => { add(form() === "chat" ? "user" : "text", "", edited).focus(); edited() })
  $("add-document").addEventListener("click", () => { add("document", "", edited).focus(); edited() })
  $("generation").addEventListener("input", edited)
  fill(remembered() || { fields: [], chat: info.chat }, edited)
  return { fill: (sample) => { fill(sample, edited); keep() } }
}

const form = () => document.querySelector("[name=form]:checked").value

// The text as the server wants it.
export function sample() {
  const fields = [...document.querySelectorAll(".field")].map((field) => ({
    kind: field.querySelector("select").value,
    text: field.querySelector("textarea").value,
  }))
  const whole = { fields, chat: form() === "chat", generation: $("generation").value, new_tokens: Number($("new-tokens").value) || 1 }
  return exact ? { ...whole, ...exact } : whole
}

export function written(event) {
  $("generation").value = event.generation
  exact = { ids: event.ids, prompt_length: event.prompt_length }
  keep()
}

export function append(text) {
  const box = $("generation")
  box.value += text
  box.scrollTop = box.scrollHeight
  exact = null
  keep()
}

function fill(kept, edited) {
  document.querySelector(`[name=form][value=${kept.chat ? "chat" : "plain"}]`).checked = true
  $("fields").replaceChildren()
  const fields = kept.fields.length ? kept.fields : [{ kind: kept.chat ? "user" : "text", text: "" }]
  for (const field of fields) add(field.kind, field.text, edited)
  $("generation").value = kept.generation || ""
  if (kept.new_tokens) $("new-tokens").value = kept.new_tokens
  exact = kept.ids ? { ids: kept.ids, prompt_length: kept.prompt_length } : null
}

function add(kind, text, edited) {
  const field = document.createElement("div"), row = document.createElement("div")
  const select = document.createElement("select"), remove = document.createElement("button")
  const area = document.createElement("textarea")
  field.className = "field"
  row.className = "row"
  select.setAttribute("aria-label", "What this field is")
  options(select, kind)
  remove.type = "button"
  remove.textContent = "Remove"
  area.rows = kind === "document" ? 8 : 4
  area.spellcheck = false
  area.value = text
  area.setAttribute("aria-label", "Text of the field")
  select.addEventListener("change", edited)
  area.addEventListener("input", edited)
  remove.addEventListener("click", () => { field.remove(); edited() })
  row.append(select, remove)
  field.append(row, area)
  $("fields").append(field)
  return area
}

function options(select, kind) {
  const kinds = KINDS[form()]
  select.replaceChildren(...kinds.map((one) => new Option(one, one)))
  select.value = kinds.includes(kind) ? kind : kinds[0]
}

function relabel() {
  for (const select of document.querySelectorAll(".field select")) options(select, select.value)
}

function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(sample()))
  } catch {
    // a text too long for the browser's storage, or storage that is switched off: it is only not kept over a reload
  }
}

function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT))
  } catch {
    return null
  }
}
