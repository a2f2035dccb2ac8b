// One message in the chat: what the user wrote, or an answer with its parts and its row of buttons.

import { copyText, h, icon, iconButton, isComposing, languageOf } from "./dom.js";
import { t } from "./i18n.js";
import { LiveMarkdown } from "./markdown.js";
import { cited, sourcesUpTo } from "./sources.js";
import { sourceList, ToolCard } from "./tools.js";
import { textOf, versions } from "./tree.js";
import { goesOn } from "./turn.js";

/** actions: {edit(message, text), again(message), turn(message, step)}. */
export class MessageView {
  constructor(conversation, message, actions) {
    this.conversation = conversation;
    this.message = message;
    this.actions = actions;
    this.parts = []; // views of the parts, in order
    const user = message.role === "user";
    this.body = h("div", { class: "body" });
    this.foot = h("div", { class: "foot" });
    const name = h("h3", { class: "unseen", text: t(user ? "you" : "assistant") });
    this.element = h("li", { class: `message ${message.role}`, data: { id: message.id } }, name, this.body, this.foot);
    if (user) this.drawUser();
    else this.update();
    this.drawFoot();
  }

  // ---------------------------------------------------------------- user

  drawUser() {
    const { content, files = [] } = this.message;
    const chips = files.map((file) => h("li", { class: "chip" }, icon("file"), h("span", { text: file.name })));
    const bubble = h("div", { class: "bubble", lang: languageOf(content), text: content });
    this.body.replaceChildren(...(chips.length ? [h("ul", { class: "chips" }, ...chips)] : []));
    if (content) this.body.append(bubble);
  }

  startEdit() {
    const area = h("textarea", { rows: "2", "aria-label": t("edit") });
    area.value = this.message.content;
    const cancel = () => {
      this.drawUser();
      this.foot.hidden = false;
      this.foot.querySelector(".edit")?.focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (!text || !this.actions.edit(this.message, text)) return;
      this.drawUser(); // this version stays as it was
      this.foot.hidden = false;
    };
    area.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    const buttons = h("div", { class: "row" },
      h("button", { type: "button", text: t("cancel"), on: { click: cancel } }),
      h("button", { type: "button", class: "solid", text: t("sendEdit"), on: { click: send } }));
    this.body.replaceChildren(h("div", { class: "editor" }, area, buttons));
    this.foot.hidden = true;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  // ---------------------------------------------------------------- answer

  /** Draw what has changed since the last time. */
  update() {
    const { message } = this;
    const ended = message.finish !== null;
    message.parts.forEach((part, i) => {
      this.parts[i] ??= this.addPart(part);
      const view = this.parts[i];
      const grows = !ended && i === message.parts.length - 1;
      if (view.ended) return;
      view.draw(!grows);
      view.ended = !grows && (part.type !== "call" || !goesOn(part));
    });
    this.element.classList.toggle("streaming", !ended);
    this.element.setAttribute("aria-busy", String(!ended));
    this.body.classList.toggle("waiting", !ended && message.parts.length === 0);
    if (ended && !this.closed) this.close();
    else if (ended && this.stats !== message.stats) this.drawFoot(); // figures come behind the last word
  }

  addPart(part) {
    if (part.type === "call") {
      const card = new ToolCard(part);
      this.body.append(card.element);
      return { draw: () => card.update() };
    }
    const prose = h("div", { class: "prose" });
    const live = new LiveMarkdown(prose, sourcesUpTo(this.conversation, this.message.id));
    const write = (ended) => {
      prose.lang = languageOf(part.text);
      live.update(part.text, ended);
    };
    if (part.type === "text") {
      this.body.append(prose);
      return { draw: write };
    }
    const summary = h("summary", {}, h("span", { text: t("thinking") }));
    this.body.append(h("details", { class: "thought" }, summary, prose));
    const draw = (ended) => {
      write(ended);
      const n = (part.seconds ?? 0).toFixed(part.seconds < 10 ? 1 : 0);
      if (ended) summary.firstChild.textContent = part.seconds ? t("thoughtFor", { n }) : t("thought");
    };
    return { draw };
  }

  close() {
    this.closed = true;
    this.drawSources();
    const { finish, error } = this.message;
    const note = { length: t("endedLength"), stopped: t("endedStopped"), error: error ? errorText(error) : "" }[finish];
    if (note) this.body.append(h("p", { class: `note ${finish}`, role: finish === "error" ? "alert" : null, text: note }));
    this.drawFoot();
  }

  /** What the answer cites, under it. */
  drawSources() {
    const found = cited(textOf(this.message), sourcesUpTo(this.conversation, this.message.id));
    if (!found.length) return;
    const title = h("h4", { text: t("sources") });
    this.body.append(h("section", { class: "sources", "aria-label": t("sources") }, title, sourceList(found)));
  }

  // ---------------------------------------------------------------- buttons

  drawFoot() {
    const { message, actions } = this;
    this.stats = message.stats;
    if (message.role === "assistant" && message.finish === null) return this.foot.replaceChildren();
    const { ids, index } = versions(this.conversation, message.id);
    const row = [];
    if (ids.length > 1) {
      const step = (name, label, by) =>
        iconButton(name, label, () => actions.turn(message, by), { disabled: !ids[index + by], class: `turn-${name}` });
      const place = h("span", { class: "place", text: `${index + 1}/${ids.length}` });
      place.setAttribute("aria-label", t("version", { n: index + 1, of: ids.length }));
      row.push(h("span", { class: "versions" }, step("left", t("before"), -1), place, step("right", t("after"), 1)));
    }
    const copy = iconButton("copy", t("copy"), async () => {
      await copyText(textOf(message));
      copy.replaceChildren(icon("check"));
      setTimeout(() => copy.replaceChildren(icon("copy")), 1500);
    }, { class: "copy" });
    if (textOf(message)) row.push(copy);
    if (message.role === "user") row.push(iconButton("edit", t("edit"), () => this.startEdit(), { class: "edit" }));
    else {
      const again = iconButton("again", t("again"), () => actions.again(message), { class: "again" });
      if (message.finish === "error") again.append(t("again")); // what there is to do now
      row.push(again);
    }
    const stats = statsText(message.stats);
    if (stats) row.push(h("span", { class: "stats", text: stats }));
    return this.foot.replaceChildren(...row);
  }
}

export function errorText({ status, text, retryAfter }) {
  if (status === 0) return t("errorOffline");
  if (status === 401) return t("errorKey");
  if (status === 429) return retryAfter ? t("errorBusyFor", { n: Math.ceil(retryAfter) }) : t("errorBusy");
  return t("errorServer", { text });
}

function statsText(stats) {
  if (!stats) return "";
  const pieces = [];
  if (stats.tok_s) pieces.push(t("speed", { n: rounded(stats.tok_s) }));
  if (stats.tokens) pieces.push(t("tokens", { n: stats.tokens }));
  if (stats.first_s >= 0.05) pieces.push(t("firstAfter", { n: stats.first_s.toFixed(1) }));
  return pieces.join(" · ");
}

export const rounded = (n) => (n < 10 ? n.toFixed(1) : String(Math.round(n)));
