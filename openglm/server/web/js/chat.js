// The chat view: shows the path through a conversation's tree, follows answers as they stream in.

import { announce, byId, copyText, h, icon, perFrame } from "./dom.js";
import { t } from "./i18n.js";
import { MessageView } from "./message.js";
import { answer, running, stop } from "./turn.js";
import { append, find, path, switchVersion, textOf, titleFrom } from "./tree.js";

const NEAR_END = 90; // px
const SAVE_EVERY_MS = 1000;

export class ChatView {
  /** app: {settings, save(conversation), changed(conversation), allTools()}. */
  constructor(app) {
    this.app = app;
    this.conversation = null;
    this.views = new Map(); // message id -> MessageView
    this.follow = true; // scroll along with the answer
    this.list = byId("messages");
    this.scroller = byId("scroller");
    this.drawFrame = perFrame(() => this.drawRunning());
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    byId("to-end").addEventListener("click", () => this.toEnd(true));
    this.list.addEventListener("click", (event) => copyClicked(event));
    byId("stop").addEventListener("click", () => this.stop());
    new ResizeObserver(() => (this.follow ? this.toEnd() : this.scrolled())).observe(this.list);
  }

  show(conversation) {
    this.conversation = conversation;
    this.views.clear();
    this.follow = true;
    this.draw();
    this.toEnd();
  }

  /** Bring the list in line with the path; views of messages that stay are kept. */
  draw() {
    const shown = path(this.conversation);
    const views = shown.map((message) => {
      const view = this.views.get(message.id) ?? new MessageView(this.conversation, message, this.actions());
      this.views.set(message.id, view);
      view.drawFoot();
      return view;
    });
    this.list.replaceChildren(...views.map((view) => view.element));
    byId("empty").hidden = shown.length > 0;
    byId("chat").classList.toggle("fresh", shown.length === 0);
    this.drawState();
  }

  drawState() {
    const busy = running.has(this.conversation.id);
    byId("stop").hidden = !busy;
    byId("send").hidden = busy;
    this.app.changed(this.conversation);
  }

  drawRunning() {
    const run = running.get(this.conversation?.id);
    if (run) this.views.get(run.message.id)?.update();
  }

  actions() {
    const { conversation } = this;
    return {
      edit: (message, content) => {
        if (running.has(conversation.id)) return false;
        const edited = append(conversation, message.parent, { role: "user", content, files: message.files });
        this.respond(edited.id);
        return true;
      },
      again: (message) => running.has(conversation.id) || this.respond(message.parent),
      turn: (message, step) => {
        if (running.has(conversation.id)) return;
        const id = switchVersion(conversation, message.id, step);
        this.follow = false;
        this.app.save(conversation);
        this.draw();
        const side = step < 0 ? "left" : "right";
        const row = this.views.get(id)?.element;
        (row?.querySelector(`.turn-${side}:enabled`) ?? row?.querySelector(".versions button:enabled"))?.focus();
      },
    };
  }

  /** Add what the user wrote and answer it. */
  send(content, files) {
    const { conversation } = this;
    const last = path(conversation).at(-1);
    const message = append(conversation, last?.id ?? null, { role: "user", content, files });
    if (!conversation.named && !conversation.title) conversation.title = titleFrom(content || files[0]?.name || "");
    return this.respond(message.id);
  }

  async respond(parent) {
    const { conversation } = this;
    this.follow = true;
    let saved = performance.now();
    this.app.save(conversation);
    announce(t("answering"));
    const onChange = (message) => {
      const shown = this.conversation === conversation;
      if (shown && !this.views.has(message.id)) {
        this.draw();
        this.toEnd();
      } else if (shown) this.drawFrame();
      if (message.finish === null && performance.now() - saved > SAVE_EVERY_MS) {
        saved = performance.now();
        this.app.save(conversation);
      }
    };
    const { sampling, askTools } = this.app.settings;
    const options = { sampling, allTools: this.app.allTools(), askTools, onChange };
    const message = await answer(conversation, parent, options);
    this.app.save(conversation);
    if (this.conversation !== conversation) return this.app.changed(conversation);
    this.views.get(message.id)?.update();
    this.drawState();
    announce(message.finish === "error" ? "" : textOf(message));
    return undefined;
  }

  stop() {
    stop(this.conversation.id);
    byId("input").focus();
  }

  /** The last answer that is shown and has figures. */
  lastStats() {
    return path(this.conversation).findLast((message) => message.stats) ?? null;
  }

  has(id) {
    return Boolean(find(this.conversation, id));
  }

  // ---------------------------------------------------------------- scrolling

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.follow = scrollHeight - scrollTop - clientHeight < NEAR_END;
    byId("to-end").hidden = this.follow;
  }

  toEnd(smooth = false) {
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior: smooth ? "smooth" : "instant" });
  }
}

/** Copy buttons of code blocks. */
async function copyClicked(event) {
  const button = event.target.closest?.(".copy-code");
  if (!button) return;
  await copyText(button.closest("figure").querySelector("pre").textContent);
  button.replaceChildren(icon("check"), t("copied"));
  setTimeout(() => button.replaceChildren(icon("copy"), t("copy")), 1500);
}

/** Example prompts of an empty chat. use(text) puts one into the composer; blank() opens the other view, if it is of use. */
export function drawExamples(use, blank) {
  const example = (name, run) =>
    h("li", {}, h("button", { type: "button", on: { click: run } }, h("strong", { text: t(`${name}Title`) }), h("span", { text: t(`${name}Text`) })));
  const ask = (name) => example(name, () => use(t(`${name}Text`)));
  const last = blank ? example("example4", blank) : ask("example5");
  byId("examples").replaceChildren(...["example1", "example2", "example3"].map(ask), last);
}
