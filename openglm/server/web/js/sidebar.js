// The list of conversations: search, open, rename, export, delete with a way back.

import { byId, h, iconButton, isComposing } from "./dom.js";
import { language, t } from "./i18n.js";
import { matches } from "./tree.js";

export class Sidebar {
  /** app: {conversations(), current(), running(id), open(id), rename(id, title), exportOne(id), remove(id)}. */
  constructor(app) {
    this.app = app;
    this.list = byId("conversations");
    this.menu = byId("row-menu");
    this.renaming = null;
    byId("search").addEventListener("input", () => this.draw());
    byId("search").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && event.target.value) {
        event.stopPropagation();
        event.target.value = "";
        this.draw();
      } else if (event.key === "ArrowDown") this.list.querySelector(".open")?.focus();
    });
    this.list.addEventListener("keydown", (event) => this.arrows(event, this.list, ".open"));
    this.menu.addEventListener("keydown", (event) => this.arrows(event, this.menu, "button"));
    this.menu.addEventListener("toggle", (event) => {
      if (event.newState !== "closed" || !this.menuButton) return;
      this.menuButton.setAttribute("aria-expanded", "false");
      if (this.menu.contains(document.activeElement) || document.activeElement === document.body) this.menuButton.focus();
    });
    this.wideEnough();
    matchMedia("(max-width: 800px)").addEventListener("change", () => this.wideEnough());
    byId("open-sidebar").addEventListener("click", () => this.setOpen(true));
    byId("close-sidebar").addEventListener("click", () => this.setOpen(false));
    byId("scrim").addEventListener("click", () => this.setOpen(false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.defaultPrevented && document.body.classList.contains("sidebar-open")) this.setOpen(false);
    });
  }

  wideEnough() {
    this.setOpen(false, false);
  }

  /** On narrow screens the sidebar slides in; on wide ones it is always there. */
  setOpen(open, focus = true) {
    const narrow = matchMedia("(max-width: 800px)").matches;
    document.body.classList.toggle("sidebar-open", open && narrow);
    byId("open-sidebar").setAttribute("aria-expanded", String(open && narrow));
    byId("sidebar").inert = narrow && !open;
    byId("main").inert = narrow && open;
    if (narrow && focus) byId(open ? "new-chat" : "open-sidebar").focus();
  }

  draw() {
    if (this.renaming) return;
    const query = byId("search").value;
    const found = this.app.conversations().filter((conversation) => matches(conversation, query));
    const focused = this.list.contains(document.activeElement) ? document.activeElement.closest("li").dataset.id : null;
    const rows = [];
    let last = "";
    for (const conversation of found) {
      const day = dayOf(conversation.updated);
      if (day !== last) rows.push(h("li", { class: "day", text: day }));
      last = day;
      rows.push(this.row(conversation));
    }
    this.list.replaceChildren(...rows);
    if (focused) this.list.querySelector(`[data-id="${CSS.escape(focused)}"] .open`)?.focus();
    const none = byId("no-match");
    none.hidden = found.length > 0;
    none.textContent = query ? t("noMatch") : t("noConversations");
  }

  row(conversation) {
    const { id } = conversation;
    const here = id === this.app.current();
    const open = h("button", {
      type: "button", class: "open", "aria-current": here ? "page" : null, text: conversation.title || t("untitled"),
      title: conversation.title,
      on: { click: () => this.app.open(id), dblclick: () => this.rename(id) },
    });
    const more = iconButton("more", t("more"), (event) => this.openMenu(event.currentTarget, id), {
      class: "more", "aria-haspopup": "menu", "aria-expanded": "false",
    });
    return h("li", { class: `${here ? "here" : ""} ${this.app.running(id) ? "busy" : ""}`, data: { id } }, open, more);
  }

  openMenu(button, id) {
    const item = (name, run, extra = "") => {
      const click = () => {
        this.menu.hidePopover();
        run(id);
      };
      return h("button", { type: "button", role: "menuitem", class: extra, text: t(name), on: { click } });
    };
    this.menuButton = button;
    button.setAttribute("aria-expanded", "true");
    this.menu.setAttribute("aria-label", t("more"));
    this.menu.replaceChildren(
      item("rename", () => this.rename(id)), item("exportOne", this.app.exportOne), item("remove", this.app.remove, "danger"));
    this.menu.showPopover();
    const place = button.getBoundingClientRect();
    const { offsetWidth, offsetHeight } = this.menu;
    this.menu.style.left = `${Math.max(8, Math.min(place.left, innerWidth - offsetWidth - 8))}px`;
    this.menu.style.top = `${Math.max(8, Math.min(place.bottom + 4, innerHeight - offsetHeight - 8))}px`;
    this.menu.firstChild.focus();
  }

  arrows(event, box, selector) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.target.matches("input")) return;
    event.preventDefault();
    const all = Array.from(box.querySelectorAll(selector));
    const at = all.indexOf(document.activeElement);
    all[Math.max(0, Math.min(all.length - 1, at + step))]?.focus();
  }

  rename(id) {
    const row = this.list.querySelector(`[data-id="${CSS.escape(id)}"]`);
    const conversation = this.app.conversations().find((c) => c.id === id);
    if (!row || !conversation) return;
    this.renaming = id;
    const input = h("input", { class: "rename", "aria-label": t("rename"), maxlength: "120" });
    input.value = conversation.title;
    const end = (keep) => {
      if (this.renaming !== id) return;
      this.renaming = null;
      if (keep && input.value.trim()) this.app.rename(id, input.value.trim());
      this.draw();
      this.list.querySelector(`[data-id="${CSS.escape(id)}"] .open`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Enter") end(true);
      else if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    input.addEventListener("blur", () => end(true));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const day = 86_400_000;
  if (time >= midnight) return t("today");
  if (time >= midnight - day) return t("yesterday");
  if (time >= midnight - 7 * day) return t("thisWeek");
  return new Intl.DateTimeFormat(language(), { year: "numeric", month: "long" }).format(time);
}
