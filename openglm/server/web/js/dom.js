// Small helpers for the document. Text goes in as text; nothing here takes HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. props: `class`, `text`, `data` (dataset), `on` (listeners), true/false attributes, else attributes. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon; the label is for screen readers and the tooltip. */
export function iconButton(name, label, onClick, extra = {}) {
  const listeners = onClick ? { click: onClick } : {};
  const { class: more = "", ...rest } = extra;
  const props = { type: "button", class: `quiet ${more}`.trim(), "aria-label": label, title: label, on: listeners };
  return h("button", { ...props, ...rest }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** A short notice at the upper edge; with an action, a button in it. */
export function toast(text, action = null, seconds = 5) {
  const box = h("div", { class: "toast", role: "status" }, h("span", { text }));
  const close = () => box.remove();
  if (action) {
    const run = () => {
      close();
      action.run();
    };
    box.append(h("button", { type: "button", class: "link", text: action.text, on: { click: run } }));
  }
  const all = byId("toasts");
  all.append(box);
  if (all.matches(":popover-open")) all.hidePopover(); // to come up in front of a dialog that has opened since
  all.showPopover();
  let timer = setTimeout(close, seconds * 1000);
  box.addEventListener("pointerenter", () => clearTimeout(timer));
  box.addEventListener("pointerleave", () => (timer = setTimeout(close, 2000)));
  return close;
}

/** Said once by screen readers, politely. */
export function announce(text) {
  byId("announce").textContent = text;
}

/** Whether this key press belongs to an input method that is composing (Chinese, Japanese ...). */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** At most once per animation frame; `now()` runs it at once. */
export function perFrame(work) {
  let frame = 0;
  const run = () => {
    frame = 0;
    work();
  };
  const ask = () => {
    if (!frame) frame = requestAnimationFrame(run);
  };
  ask.now = () => {
    if (frame) cancelAnimationFrame(frame);
    run();
  };
  return ask;
}

/** Hand the browser a file to save. */
export function download(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // no clipboard outside a secure context: the old way
    const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = text;
    const open = document.querySelector("dialog[open]");
    (open || document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** "zh-CN" for mostly Chinese text, "en" for Latin, so that fonts and screen readers fit. */
export function languageOf(text) {
  const sample = text.slice(0, 400);
  const han = (sample.match(/\p{Script=Han}/gu) || []).length;
  const latin = (sample.match(/\p{Script=Latin}/gu) || []).length;
  return han * 3 > latin ? "zh-CN" : "en";
}
