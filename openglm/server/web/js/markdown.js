// Markdown to document nodes, as it streams in. All HTML goes through DOMPurify; code and maths are drawn afterwards.

import { Marked } from "../vendor/marked/marked.esm.js";
import { EXTENSIONS, setLive, setSources } from "./dialect.js";
import { icon } from "./dom.js";
import { t } from "./i18n.js";
import { sanitize } from "./sanitize.js";

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  extensions: EXTENSIONS,
  renderer: {
    // HTML in an answer is shown as it was written, but for a few plain tags that models use in tables and text.
    html: ({ text, block: whole }) => (whole ? text.trimEnd() : text).split(/(<\/?(?:br|sub|sup|kbd|u|mark)\s*\/?>)/i).map((s, i) => (i % 2 ? s : escaped(s))).join(""),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const lines = (text) => text.replace(/\r\n?/g, "\n").replace(/\u0000/g, "\ufffd");

/**
 * One answer that grows. `update` draws what has changed: blocks that cannot change any more are neither parsed nor
 * drawn again, so a long answer costs per frame what its last block costs.
 */
export class LiveMarkdown {
  /** sources: number -> {url, title} of what may be cited. */
  constructor(element, sources = new Map()) {
    this.element = element;
    this.sources = sources;
    this.reset();
  }

  reset() {
    this.settled = ""; // source of the blocks that stay
    this.links = {}; // reference definitions seen in them
    this.tail = []; // [{raw, node}] of the blocks behind
    this.element.replaceChildren();
  }

  /** text: the whole answer so far. ended: nothing follows. */
  update(text, ended = false) {
    const source = lines(text);
    if (ended && this.settled) {
      // Definitions that came late count for what stands before them: parse all once more, redraw what differs.
      this.tail = [...this.done(), ...this.tail];
      this.settled = "";
      this.links = {};
    } else if (!source.startsWith(this.settled)) this.reset();
    const tokens = this.lex(source.slice(this.settled.length), ended);
    this.draw(tokens, ended);
    if (!ended) this.settle(tokens);
  }

  lex(source, ended) {
    setLive(!ended);
    setSources(this.sources);
    const lexer = new marked.Lexer(marked.defaults);
    Object.assign(lexer.tokens.links, this.links);
    const tokens = lexer.lex(source);
    this.seen = { ...tokens.links };
    return tokens;
  }

  /** Blocks drawn and settled before, in order, as entries of the tail. */
  done() {
    const kept = this.tail.map(({ node }) => node);
    const nodes = Array.from(this.element.children).filter((node) => !kept.includes(node));
    return nodes.map((node) => ({ raw: node.openglmSource, node }));
  }

  draw(tokens, ended) {
    const shown = tokens.filter((token) => token.type !== "space" && token.type !== "def");
    shown.forEach((token, i) => {
      const old = this.tail[i];
      const complete = ended || i < shown.length - 1;
      const late = !complete && token.raw.length > MAX_COLOURED_LIVE; // to be coloured when nothing more comes
      const key = token.raw.trimEnd() + (ended ? referencesOf(token, this.seen) : "") + (late ? "…" : "");
      if (old && old.raw === key) return;
      const node = block(marked.parser([token]), complete);
      node.openglmSource = key;
      if (old) old.node.replaceWith(node);
      else this.element.append(node);
      this.tail[i] = { raw: key, node };
    });
    for (const { node } of this.tail.splice(shown.length)) node.remove();
  }

  /** Everything before the last block of text stays as it is: what follows can only extend that last one. */
  settle(tokens) {
    let last = tokens.length - 1;
    while (last > 0 && tokens[last].type === "space") last--;
    if (tokens[last]?.raw.length < 8) return; // "2" may become "2. ", the next item of the list before it
    for (let i = 0; i < last; i++) {
      const token = tokens[i];
      this.settled += token.raw;
      if (token.type !== "space" && token.type !== "def") this.tail.shift();
    }
    if (last > 0) this.links = this.seen;
  }
}

/** What a block shows besides its source: the addresses of references in it. */
function referencesOf(token, links) {
  if (!token.raw.includes("[")) return "";
  const used = Object.keys(links).filter((name) => token.raw.toLowerCase().includes(name));
  return used.length ? JSON.stringify(used.map((name) => [name, links[name].href])) : "";
}

/** Draw a text that is complete. */
export function render(element, text) {
  new LiveMarkdown(element).update(text, true);
}

/** One block of an answer. complete: its source will not grow, so long code may be coloured. */
function block(html, complete) {
  const node = document.createElement("div");
  node.className = "block";
  node.append(sanitize(html));
  for (const code of node.querySelectorAll("pre > code")) frameCode(code, complete);
  for (const table of node.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table";
    frame.tabIndex = 0;
    table.replaceWith(frame);
    frame.append(table);
  }
  const sources = node.querySelectorAll("code.math");
  if (sources.length) drawMath(sources);
  return node;
}

// ---------------------------------------------------------------- code

const MAX_COLOURED = 60_000; // characters
const MAX_COLOURED_LIVE = 6_000;
let highlighter = null;
let highlighterAsked = null;

function loadHighlighter() {
  highlighterAsked ??= import("../vendor/highlight/highlight.min.js").then((module) => (highlighter = module.default));
  return highlighterAsked;
}

function frameCode(code, complete) {
  const language = (Array.from(code.classList).find((name) => name.startsWith("language-")) || "").slice(9);
  const frame = document.createElement("figure");
  frame.className = "code";
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "quiet copy-code";
  copy.append(icon("copy"), t("copy"));
  const head = document.createElement("figcaption");
  head.append(language || t("code"), copy);
  const pre = code.parentElement;
  pre.replaceWith(frame);
  frame.append(head, pre);
  pre.tabIndex = 0;
  colour(code, language, complete ? MAX_COLOURED : MAX_COLOURED_LIVE);
}

/** Colour the text of a code element, at once if the highlighter is here, else when it comes. */
export function colour(code, language, limit = MAX_COLOURED) {
  if (!language || code.textContent.length > limit) return;
  if (!highlighter) {
    loadHighlighter().then(() => code.isConnected && colour(code, language, limit));
    return;
  }
  if (!highlighter.getLanguage(language)) return;
  const { value } = highlighter.highlight(code.textContent, { language, ignoreIllegals: true });
  code.replaceChildren(sanitize(value));
}

// ---------------------------------------------------------------- maths

let katex = null;
let katexAsked = null;
const drawn = new Map(); // source -> node
const MAX_DRAWN = 500;

function loadMath() {
  katexAsked ??= new Promise((resolve) => {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("../vendor/katex/katex.min.css", import.meta.url).href;
    style.addEventListener("load", resolve);
    style.addEventListener("error", resolve);
    document.head.append(style);
  }).then(() => import("../vendor/katex/katex.min.js")).then(() => (katex = globalThis.katex));
  return katexAsked;
}

function drawMath(sources) {
  if (!katex) {
    loadMath().then(() => drawMath(Array.from(sources).filter((source) => source.isConnected)));
    return;
  }
  for (const source of sources) source.replaceWith(formula(source.textContent, source.classList.contains("display")));
}

/** KaTeX writes a few styles as attributes, which the page's policy forbids; as properties they are allowed. */
function withStyles(work) {
  const plain = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function setAttribute(name, value) {
    if (name === "style") this.style.cssText = value;
    else plain.call(this, name, value);
  };
  try {
    work();
  } finally {
    Element.prototype.setAttribute = plain;
  }
}

function formula(tex, display) {
  const key = `${display}${tex}`;
  if (!drawn.has(key)) {
    const node = document.createElement(display ? "div" : "span");
    node.className = display ? "formula display" : "formula";
    // KaTeX builds nodes, not HTML; `trust` false leaves out links, classes and pictures; sizes are bounded.
    const options = { displayMode: display, throwOnError: false, trust: false, strict: "ignore", maxSize: 20, maxExpand: 300 };
    withStyles(() => katex.render(tex, node, { ...options, errorColor: "currentColor" }));
    sanitize(node);
    if (drawn.size >= MAX_DRAWN) drawn.clear();
    drawn.set(key, node);
  }
  return drawn.get(key).cloneNode(true);
}
