// Fill the blank: write a text with blanks, see what the model would put there and how likely it finds each.

import { ApiError, fillBlanks } from "./api.js";
import { announce, byId, h, icon, isComposing, languageOf, toast } from "./dom.js";
import { t } from "./i18n.js";
import { errorText } from "./message.js";

export const BLANK = "____";
const BLANKS = /_{2,}|\[[sg]?MASK\]/g;
const COUNTS = [3, 5, 10];
const LENGTHS = [8, 32, 64];

/** The text between the blanks, as many pieces as blanks and one. */
export const piecesOf = (text) => text.split(BLANKS);

/** The text as the model wants it: a mark for every blank. */
export const withMarks = (text) => text.replace(BLANKS, (blank) => (blank.startsWith("_") ? "[MASK]" : blank));

export class FillView {
  /** app: {model()}. */
  constructor(app) {
    this.app = app;
    this.text = "";
    this.count = 5;
    this.length = 32;
    this.controller = null;
    this.fillings = null; // {source, list} of the last answer
    this.draw();
  }

  /** Build the view anew, in the language of the page. */
  draw() {
    this.input = h("textarea", { id: "fill-input", rows: "3", spellcheck: "false", "aria-label": t("fillLabel"), placeholder: t("fillPlaceholder") });
    this.input.value = this.text;
    this.mirror = h("div", { class: "mirror", "aria-hidden": "true" });
    this.run = h("button", { type: "button", class: "solid", id: "fill-run", on: { click: () => this.ask() } });
    this.results = h("ol", { id: "fillings", "aria-label": t("fillings") });
    this.note = h("p", { class: "hint", id: "fill-note" });
    const insert = h("button", { type: "button", id: "insert-blank", on: { click: () => this.insertBlank() } }, icon("blank"), t("insertBlank"));
    const pick = (name, values, current, set) => {
      const select = h("select", { id: `fill-${name}` }, ...values.map((v) => h("option", { value: v, text: v })));
      select.value = current;
      select.addEventListener("change", () => set(Number(select.value)));
      return h("label", { class: "pick" }, t(name), select);
    };
    const row = h("div", { class: "row wrap" }, insert,
      pick("fillCount", COUNTS, this.count, (n) => (this.count = n)),
      pick("fillLength", LENGTHS, this.length, (n) => (this.length = n)),
      h("span", { class: "spring" }), this.run);
    const examples = ["fillExample1", "fillExample2", "fillExample3"].map((name) =>
      h("button", { type: "button", class: "link", text: t(name), on: { click: () => this.write(t(name)) } }));
    byId("fill").replaceChildren(h("div", { class: "page" },
      h("h2", { text: t("fillTitle") }), h("p", { class: "lead", text: t("fillLead") }),
      h("div", { class: "sheet" }, h("div", { class: "paper" }, this.mirror, this.input), row),
      h("p", { class: "examples" }, t("fillTry"), ...examples), this.note, this.results));
    this.input.addEventListener("input", () => this.changed());
    this.input.addEventListener("scroll", () => (this.mirror.scrollTop = this.input.scrollTop), { passive: true });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
        event.preventDefault();
        this.ask();
      }
    });
    this.changed();
    if (this.fillings) this.drawFillings();
  }

  write(text) {
    this.input.value = text;
    this.input.focus();
    this.changed();
  }

  /** Put a blank where the cursor is, or in place of what is selected. */
  insertBlank() {
    const { input } = this;
    const { selectionStart: start, selectionEnd: end, value } = input;
    const touches = (side) => side && /[\p{Script=Latin}\d]/u.test(side);
    const before = touches(value[start - 1]) ? " " : "";
    const after = touches(value[end]) ? " " : "";
    input.focus();
    const blank = before + BLANK + after;
    if (!document.execCommand("insertText", false, blank)) input.setRangeText(blank, start, end, "end");
    this.changed();
  }

  changed() {
    this.text = this.input.value;
    const blanks = this.text.match(BLANKS) ?? [];
    const nodes = piecesOf(this.text).flatMap((piece, i) => (i < blanks.length ? [piece, h("mark", { text: blanks[i] })] : [piece]));
    this.mirror.replaceChildren(...nodes, "\u200b");
    this.drawState();
  }

  drawState() {
    const busy = this.controller !== null;
    const able = this.app.model()?.fills !== false;
    const blanks = this.text.match(BLANKS)?.length ?? 0;
    this.run.textContent = busy ? t("stop") : t("fillRun");
    this.run.disabled = !busy && (!able || !blanks);
    this.note.textContent = able ? (this.text.trim() && !blanks ? t("fillNeedsBlank") : "") : t("fillUnable");
    this.note.classList.remove("error");
    this.note.classList.toggle("unable", !able);
  }

  async ask() {
    if (this.controller) return this.controller.abort();
    if (this.run.disabled) return undefined;
    const source = this.text;
    this.controller = new AbortController();
    this.drawState();
    this.results.classList.add("waiting");
    announce(t("answering"));
    let trouble = null;
    try {
      const list = await fillBlanks(withMarks(source), this.count, this.length, this.controller.signal);
      this.fillings = { source, list };
      this.drawFillings();
      announce(t("fillFound", { n: list.length }));
    } catch (error) {
      if (error.name !== "AbortError") trouble = error;
    }
    this.controller = null;
    this.results.classList.remove("waiting");
    this.drawState();
    if (!trouble) return undefined;
    const known = trouble instanceof ApiError ? trouble : { status: -1, message: trouble.message };
    this.note.textContent = errorText({ status: known.status, text: known.message, retryAfter: known.retryAfter });
    this.note.classList.add("error");
    return undefined;
  }

  drawFillings() {
    const { source, list } = this.fillings;
    const pieces = piecesOf(source);
    const most = Math.max(...list.map(({ probability }) => probability || 0), 1e-12);
    const rows = list.map((filling) => {
      const blanks = pieces.slice(1).map((_, i) => String(filling.blanks?.[i] ?? ""));
      const text = h("span", { class: "text", lang: languageOf(source) });
      pieces.forEach((piece, i) => text.append(...(i ? [h("mark", { text: blanks[i - 1] })] : []), piece));
      const bar = h("span", { class: "bar", "aria-hidden": "true" }, h("span", {}));
      bar.firstChild.style.width = `${Math.max(1, (100 * (filling.probability || 0)) / most)}%`;
      const figure = h("span", { class: "figure", text: percent(filling.probability) });
      const take = () => this.take(source, pieces, blanks);
      const button = h("button", { type: "button", title: t("fillTake"), on: { click: take } }, text, bar, figure);
      button.setAttribute("aria-label", `${text.textContent} ${percent(filling.probability)}. ${t("fillTake")}`);
      return h("li", {}, button);
    });
    this.results.replaceChildren(...rows);
  }

  take(source, pieces, blanks) {
    this.write(pieces.map((piece, i) => (i ? blanks[i - 1] : "") + piece).join(""));
    toast(t("fillTaken"), { text: t("undo"), run: () => this.write(source) });
  }
}

function percent(p) {
  if (typeof p !== "number" || !Number.isFinite(p)) return "";
  const value = 100 * p;
  if (value < 0.001) return "< 0.001 %"; // several blanks together are rarely likely: digits tell them apart
  return `${value < 0.1 ? value.toPrecision(1) : value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}
