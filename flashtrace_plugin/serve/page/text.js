// The text as tokens: shaded by what was found, with a target that is dragged over or chosen by keyboard.

const $ = (id) => document.getElementById(id)
const LEVELS = 40

let spans = [], prompt = 0, cursor = null, anchor = null

export function show(text) {
  prompt = text.prompt_length
  spans = text.tokens.map((token, i) => {
    const span = document.createElement("span")
    span.textContent = token
    span.dataset.i = i
    return span
  })
  $("prompt").replaceChildren(...spans.slice(0, prompt))
  $("answer").replaceChildren(...spans.slice(prompt))
  $("text").hidden = false
  cursor = anchor = null
}

export const length = () => spans.length
export const piece = (a, b) => spans.slice(a, b).map((span) => span.textContent).join("").trim()

// Shades by values per token; the prompt and what follows it have a scale of their own.
export function shade(values) {
  const tops = [values.slice(0, prompt), values.slice(prompt)].map((part) => part.reduce((a, b) => Math.max(a, b), 0))
  spans.forEach((span, i) => {
    const top = tops[i < prompt ? 0 : 1]
    const step = top > 0 ? Math.min(LEVELS, Math.round(LEVELS * Math.sqrt(values[i] / top))) : 0
    span.className = step ? `s${step}` : ""
  })
}

export function mark(name, from, to) {
  for (const span of spans) span.classList.remove(name)
  for (const span of spans.slice(from, to)) span.classList.add(name)
}

export function reveal(from, to) {
  mark("marked", from, to)
  spans[from]?.scrollIntoView({ block: "nearest" })
}

// Calls `chosen(from, to)` for tokens of the answer that were dragged over, clicked, or chosen by keyboard.
export function choosing(chosen, spoken) {
  const answer = $("answer")
  answer.addEventListener("pointerup", (event) => {
    const range = dragged(event)
    if (!range) return
    getSelection().removeAllRanges()
    chosen(...range)
  })
  answer.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && cursor !== null) {
      event.preventDefault()
      chosen(...picked())
      return
    }
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key]
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return
    event.preventDefault()
    const start = cursor === null ? prompt - Math.sign(step) * (step > 0 ? 1 : 0) : cursor
    cursor = Math.min(spans.length - 1, Math.max(prompt, start + step))
    if (!event.shiftKey || anchor === null) anchor = cursor
    mark("picked", ...picked())
    mark("at", cursor, cursor + 1)
    spans[cursor].scrollIntoView({ block: "nearest" })
    spoken(piece(...picked()))
  })
  answer.addEventListener("blur", () => { mark("picked", 0, 0); mark("at", 0, 0) })
}

const picked = () => [Math.min(anchor, cursor), Math.max(anchor, cursor) + 1]

function dragged(event) {
  const selection = getSelection()
  if (selection.rangeCount && !selection.isCollapsed) {
    const range = selection.getRangeAt(0)
    const inside = spans.slice(prompt).filter((span) => touches(range, span))
    if (inside.length) return [Number(inside[0].dataset.i), Number(inside.at(-1).dataset.i) + 1]
  }
  const at = event.target.dataset?.i
  return at === undefined ? null : [Number(at), Number(at) + 1]
}

// Whether a character of the token is selected; a range that ends where a token begins does not touch it.
function touches(range, span) {
  if (!span.firstChild || !range.intersectsNode(span)) return false
  const own = document.createRange()
  own.selectNodeContents(span)
  const begins = range.compareBoundaryPoints(Range.START_TO_END, own) > 0
  const ends = range.compareBoundaryPoints(Range.END_TO_START, own) < 0
  return begins && ends && between(range, own).trim() !== ""
}

function between(range, own) {
  const part = own.cloneRange()
  if (range.compareBoundaryPoints(Range.START_TO_START, own) > 0) part.setStart(range.startContainer, range.startOffset)
  if (range.compareBoundaryPoints(Range.END_TO_END, own) < 0) part.setEnd(range.endContainer, range.endOffset)
  return part.toString()
}
