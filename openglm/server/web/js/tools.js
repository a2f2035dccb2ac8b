// The card of a tool call. In one line: tool, result, time; open: arguments, output as it comes, pages. Pictures, files
// and the question whether it may run stand below, always in sight.

import { decide, localAddress } from "./api.js";
import { announce, h, icon, toast } from "./dom.js";
import { t } from "./i18n.js";
import { colour } from "./markdown.js";
import { isLocal } from "./sanitize.js";
import { hostOf } from "./sources.js";

const ICONS = { python: "tool", simple_browser: "web", browser: "web", cogview: "image", image: "image" };
const STATUS = {
  running: "toolRunning", approval: "toolApproval", ok: "toolOk", error: "toolError", refused: "toolRefused",
  denied: "toolDenied", repeated: "toolRepeated", cut: "toolCut", stopped: "toolStopped",
};
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
    this.output = h("pre", { class: "output", tabindex: "0" }, h("code", {}));
    this.pages = h("div", { class: "tool-pages" });
    this.files = h("div", { class: "tool-files" });
    this.question = h("div", { class: "approval", role: "group", hidden: true });
    this.outputTitle = h("h4", { text: t("toolOutput") });
    const body = h("div", { class: "body" },
      h("h4", { text: t("toolArguments") }), h("pre", { tabindex: "0" }, this.input),
      this.outputTitle, this.output, this.pages);
    const summary = h("summary", {}, this.state, this.name, this.line, this.time);
    this.fold = h("details", {}, summary, body);
    this.element = h("div", { class: "tool" }, this.fold, this.question, this.files);
    this.chosen = false; // whether the user has opened or closed it
    summary.addEventListener("click", () => (this.chosen = true));
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
    this.fold.firstChild.setAttribute("aria-label", label.filter(Boolean).join(", "));
    // What runs and shows something, or waits for the user, is open; the user's own wish counts for more.
    if (!this.chosen) this.fold.open = part.status === "approval" || (part.status === "running" && Boolean(part.output));
    this.drawInput();
    this.drawOutput();
    this.drawQuestion();
    this.drawPages();
    this.drawFiles();
  }

  drawOutput() {
    const { part } = this;
    const live = !part.content && Boolean(part.output);
    const text = live ? part.output.slice(-MAX_SHOWN) : part.content;
    const shown = text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}\n…` : text;
    this.output.hidden = this.outputTitle.hidden = !shown;
    if (this.output.firstChild.textContent === shown) return;
    const atEnd = this.output.scrollHeight - this.output.scrollTop - this.output.clientHeight < 20;
    this.output.firstChild.textContent = shown;
    if (live && atEnd) this.output.scrollTop = this.output.scrollHeight;
  }

  /** Whether the call may run: two buttons while it waits. */
  drawQuestion() {
    const asks = this.part.status === "approval";
    if (asks === !this.question.hidden) return;
    this.question.hidden = !asks;
    if (!asks) return this.question.replaceChildren();
    const text = t("approvalAsk", { name: this.part.name || t("tool") });
    this.question.setAttribute("aria-label", text);
    const button = (name, allow) =>
      h("button", { type: "button", class: allow ? "solid" : "", text: t(name), on: { click: () => this.decide(allow) } });
    this.question.replaceChildren(h("span", { text }), button("deny", false), button("approve", true));
    announce(text);
  }

  async decide(allow) {
    const buttons = this.question.querySelectorAll("button");
    for (const button of buttons) button.disabled = true;
    try {
      await decide(this.part.id, allow);
    } catch (error) {
      toast(t("approvalFailed", { why: error.message }));
      for (const button of buttons) button.disabled = false;
    }
  }

  drawPages() {
    const pages = this.part.sources ?? [];
    const key = JSON.stringify(pages);
    if (key === this.drawnPages) return;
    this.drawnPages = key;
    this.pages.replaceChildren(...(pages.length ? [h("h4", { text: t("toolPages") }), sourceList(pages)] : []));
  }

  /** The result in a line, or what is being done. */
  summary() {
    const { part } = this;
    if (["denied", "stopped", "approval", "cut"].includes(part.status)) return t(STATUS[part.status]);
    const lines = (part.content || part.output || "").trim().split("\n").filter((line) => line.trim());
    const line = part.status === "error" || part.status === "running" ? lines.at(-1) : lines[0];
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

/** Links to sources, each with its number and host; they open in a new tab. */
export function sourceList(sources) {
  const entry = ({ number, url, title }) =>
    h("li", { value: String(number) },
      h("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow", text: title || url }),
      " ", h("span", { class: "host", text: hostOf(url) }));
  return h("ol", {}, ...sources.map(entry));
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
