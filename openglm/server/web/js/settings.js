// The drawer at the right: system prompt, sampling, appearance, and what the browser keeps.

import { byId, h, iconButton } from "./dom.js";
import { t } from "./i18n.js";

const RANGES = [
  { name: "temperature", min: 0, max: 2, step: 0.05, start: 0.8 },
  { name: "top_p", min: 0.05, max: 1, step: 0.05, start: 0.95 },
];
const NUMBERS = [
  { name: "max_tokens", min: 1, max: 1_000_000 },
  { name: "seed", min: 0, max: 4_294_967_295 },
];

export class SettingsDrawer {
  /** app: {settings, saveSettings(), system(), setSystem(text), model(), setTheme, setLanguage, exportAll, importFile, removeAll}. */
  constructor(app) {
    this.app = app;
    this.dialog = byId("settings");
    byId("open-settings").addEventListener("click", () => this.open());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  open() {
    this.draw();
    this.dialog.showModal();
  }

  draw() {
    const close = iconButton("close", t("close"), () => this.dialog.close());
    this.dialog.replaceChildren(h("div", { class: "inner" },
      h("header", {}, h("h2", { id: "settings-title", text: t("settings") }), close),
      this.systemPrompt(), this.sampling(), this.tools(), this.appearance(), this.kept(), this.aboutModel()));
  }

  systemPrompt() {
    const area = h("textarea", { id: "system", rows: "4", placeholder: t("systemHint") });
    area.value = this.app.system();
    area.addEventListener("input", () => this.app.setSystem(area.value));
    return h("section", {}, h("label", { for: "system", class: "head", text: t("system") }), area);
  }

  sampling() {
    const rows = [...RANGES.map((range) => this.range(range)), ...NUMBERS.map((field) => this.number(field))];
    return h("section", {}, h("h3", { text: t("sampling") }), ...rows);
  }

  set(name, value) {
    if (value === null) delete this.app.settings.sampling[name];
    else this.app.settings.sampling[name] = value;
    this.app.saveSettings();
  }

  range({ name, start, ...limits }) {
    const id = `set-${name}`;
    const own = this.app.model()?.defaults?.[name]; // what the model's makers chose
    const input = h("input", { type: "range", id, ...limits });
    const shown = h("output", { for: id });
    const reset = iconButton("again", t("toDefault"), () => show(null), { class: "reset" });
    const show = (value) => {
      input.value = value ?? own ?? start;
      input.classList.toggle("unset", value === null);
      shown.textContent = value === null ? t("default") : value.toFixed(2);
      if (value === null && typeof own === "number") shown.textContent += ` ${own.toFixed(2)}`;
      input.setAttribute("aria-valuetext", shown.textContent);
      reset.disabled = value === null;
      this.set(name, value);
    };
    input.addEventListener("input", () => show(Number(input.value)));
    show(this.app.settings.sampling[name] ?? null);
    return h("div", { class: "field range" }, h("label", { for: id, text: t(name) }), shown, reset, input);
  }

  number({ name, min, max }) {
    const id = `set-${name}`;
    const input = h("input", { type: "number", id, min, max, step: 1, placeholder: t("default"), inputmode: "numeric" });
    input.value = this.app.settings.sampling[name] ?? "";
    input.addEventListener("input", () => {
      const value = input.value.trim() === "" ? null : Number(input.value);
      const fine = value === null || (Number.isInteger(value) && value >= min && value <= max);
      input.setAttribute("aria-invalid", String(!fine));
      if (fine) this.set(name, value);
    });
    return h("div", { class: "field" }, h("label", { for: id, text: t(name) }), input);
  }

  choice(name, values, current, pick) {
    const buttons = values.map(([value, label]) =>
      h("button", {
        type: "button", "aria-pressed": String(value === current), text: label,
        on: {
          click: (event) => {
            for (const other of event.currentTarget.parentElement.children) other.setAttribute("aria-pressed", "false");
            event.currentTarget.setAttribute("aria-pressed", "true");
            pick(value);
          },
        },
      }));
    return h("div", { class: "field" }, h("span", { id: `choice-${name}`, text: t(name) }),
      h("div", { class: "choice", role: "group", "aria-labelledby": `choice-${name}` }, ...buttons));
  }

  /** Whether each call waits for the user, where the server has tools. */
  tools() {
    if (!this.app.model()?.all_tools) return null;
    const values = [[false, t("toolsRun")], [true, t("toolsAsk")]];
    return h("section", {}, h("h3", { text: t("allTools") }),
      this.choice("toolCalls", values, this.app.settings.askTools, (value) => {
        this.app.settings.askTools = value;
        this.app.saveSettings();
      }));
  }

  appearance() {
    const { settings } = this.app;
    const themes = ["auto", "light", "dark"].map((value) => [value, t(`theme_${value}`)]);
    return h("section", {}, h("h3", { text: t("appearance") }),
      this.choice("theme", themes, settings.theme, this.app.setTheme),
      this.choice("language", [["en", "English"], ["zh", "中文"]], settings.language, (value) => {
        this.app.setLanguage(value);
        this.draw();
      }));
  }

  kept() {
    const file = h("input", { type: "file", accept: ".json,application/json", hidden: true, id: "import-file" });
    file.addEventListener("change", () => {
      if (file.files[0]) this.app.importFile(file.files[0]);
      file.value = "";
    });
    const button = (name, run, extra = "") => h("button", { type: "button", class: extra, id: name, text: t(name), on: { click: run } });
    const sure = button("removeAll", () => {
      if (sure.dataset.sure) {
        this.dialog.close();
        return this.app.removeAll();
      }
      sure.dataset.sure = "1";
      sure.textContent = t("removeAllSure");
      return undefined;
    }, "danger");
    return h("section", {}, h("h3", { text: t("conversations") }), h("p", { class: "hint", text: t("keptHere") }),
      h("div", { class: "row wrap" }, button("exportAll", this.app.exportAll), button("importAll", () => file.click()), sure, file));
  }

  aboutModel() {
    const model = this.app.model();
    if (!model) return null;
    const rows = [[t("model"), model.id], [t("contextLength"), model.context_length], [t("chatFormat"), model.chat_format]];
    const list = rows.filter(([, value]) => value).flatMap(([name, value]) => [h("dt", { text: name }), h("dd", { text: String(value) })]);
    return h("section", {}, h("h3", { text: t("model") }), h("dl", {}, ...list));
  }
}

/** Ask for the server's key in a dialog. again: the last one was refused. Resolves to the key or null. */
export function askKey(again) {
  const dialog = byId("key-dialog");
  const input = h("input", { type: "password", autocomplete: "off", id: "key", required: true });
  const cancel = h("button", { type: "button", text: t("cancel"), on: { click: () => dialog.close("") } });
  const form = h("form", { method: "dialog" },
    h("h2", { id: "key-title", text: t("keyTitle") }),
    h("p", { class: again ? "note error" : "hint", text: again ? t("keyWrong") : t("keyHint") }),
    h("label", { for: "key", class: "unseen", text: t("keyTitle") }), input,
    h("div", { class: "row end" }, cancel, h("button", { type: "submit", class: "solid", text: t("ok") })));
  return new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close("given");
    });
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given" ? input.value.trim() || null : null), { once: true });
    dialog.returnValue = "";
    dialog.replaceChildren(form);
    if (!dialog.open) dialog.showModal();
    input.focus();
  });
}
