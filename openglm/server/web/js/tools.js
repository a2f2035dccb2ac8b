// The card of a tool call: closed, one line (tool, time, result); open, arguments, output, pictures and files.

import { localAddress } from "./api.js";
import { h, icon } from "./dom.js";
import { t } from "./i18n.js";
import { colour } from "./markdown.js";
import { isLocal } from "./sanitize.js";

const ICONS = { python: "tool", simple_browser: "web", browser: "web", cogview: "image", image: "image" };
const STATUS = { running: "toolRunning", ok: "toolOk", error: "toolError", denied: "toolDenied", stopped: "toolStopped" };
const MAX_SHOWN = 40_000; // characters of an output; the rest is in the copy that the model got

/** A card that shows a part of type "call"; `update()` draws it again after the part has changed. */
export class ToolCard {
  constructor(part) {
    this.part = part;
    this.drawnFiles = "";
    this.state = h("span", { class: "state" });
    this.name = h("span", { class: "name" });
    this.line = h("span", { class: "line" });
    this.time = h("span", { class: "time" });
    this.input = h("code", {});
    this.output = h("pre", { tabindex: "0" }, h("code", {}));
    this.files = h("div", { class: "tool-files" });
    this.outputTitle = h("h4", { text: t("toolOutput") });
    const body = h("div", { class: "body" },
      h("h4", { text: t("toolArguments") }), h("pre", { tabindex: "0" }, this.input),
      this.outputTitle, this.output, this.files);
    const summary = h("summary", {}, this.state, this.name, this.line, this.time);
    this.element = h("details", { class: "tool" }, summary, body);
    this.update();
  }

  update() {
    const { part } = this;
    const name = part.name || t("tool");
    this.element.dataset.status = part.status;
    this.state.replaceChildren(icon(ICONS[part.name] || "tool"));
    this.name.textContent = name;
    this.line.textContent = this.summary();
    this.time.textContent = typeof part.seconds === "number" ? t("seconds", { n: part.seconds.toFixed(1) }) : "";
    const label = [name, t(STATUS[part.status] || "toolOk"), this.time.textContent, this.line.textContent];
    this.element.firstChild.setAttribute("aria-label", label.filter(Boolean).join(", "));
    this.drawInput();
    const shown = part.content.length > MAX_SHOWN ? `${part.content.slice(0, MAX_SHOWN)}\n…` : part.content;
    if (this.output.firstChild.textContent !== shown) this.output.firstChild.textContent = shown;
    this.output.hidden = this.outputTitle.hidden = !part.content;
    this.drawFiles();
  }

  /** The result in a line, or what is being done. */
  summary() {
    const { part } = this;
    if (part.status === "denied") return t("toolDenied");
    if (part.status === "stopped") return t("toolStopped");
    const lines = part.content.trim().split("\n").filter((line) => line.trim());
    const line = part.status === "error" ? lines.at(-1) : lines[0];
    if (line) return line.trim().slice(0, 160);
    if (part.files.length) return part.files.map((file) => file.name).join(", ").slice(0, 160);
    return part.status === "running" ? t("toolRunning") : t("toolNothing");
  }

  drawInput() {
    const { text, language } = readable(this.part.arguments);
    if (this.input.textContent === text) return;
    this.input.textContent = text;
    if (this.part.status !== "running" || text.length < 4000) colour(this.input, language);
  }

  drawFiles() {
    const key = JSON.stringify(this.part.files);
    if (key === this.drawnFiles) return;
    this.drawnFiles = key;
    this.files.replaceChildren(...this.part.files.map(fileView));
  }
}

/** Arguments for a reader: the one text they hold (code, a query) as it is, else indented JSON. */
export function readable(source) {
  try {
    const value = JSON.parse(source || "{}");
    const entries = value && typeof value === "object" && !Array.isArray(value) ? Object.entries(value) : [];
    if (entries.length === 1 && typeof entries[0][1] === "string") {
      return { text: entries[0][1], language: entries[0][0] === "code" ? "python" : "" };
    }
    return { text: entries.length ? JSON.stringify(value, null, 2) : source, language: "json" };
  } catch {
    return { text: source, language: "" }; // still streaming, or no JSON
  }
}

function fileView(file) {
  const name = file.name || t("file");
  const image = file.mime.startsWith("image/");
  if (!isLocal(file.url, image)) return h("span", { class: "file", title: t("fileForeign") }, icon("file"), name);
  const link = h("a", { class: "file", download: name.replace(/[/\\\u0000-\u001f]/g, "_") }, icon("file"), name);
  const picture = image ? h("img", { alt: name }) : null;
  localAddress(file.url).then(
    (address) => {
      link.href = address;
      if (picture) picture.src = address;
    },
    () => link.append(` (${t("fileGone")})`),
  );
  return picture ? h("figure", {}, picture, h("figcaption", {}, link)) : link;
}
