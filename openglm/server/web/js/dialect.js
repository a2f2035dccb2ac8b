// What answers write beyond GitHub's markdown, as extensions of marked: formulas, citations, bold text in Chinese.

// $$ ... $$ and \[ ... \] as blocks; \( ... \), $$ ... $$ and $ ... $ in a line. As in pandoc, a single $ opens only
// before a non-space and closes only after one and not before a digit, so that prices stay prices.
const BLOCK = /^ {0,3}(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/;
const INLINE = [
  [/^\$\$((?:[^$\\]|\\[\s\S])+?)\$\$/, true],
  [/^\\\[([\s\S]+?)\\\]/, true],
  [/^\\\(([\s\S]+?)\\\)/, false],
  [/^\$((?![\s$])(?:[^$\\\n]|\\[^\n])*?(?:[^\s$\\]|\\[^\n]))\$(?!\d)/, false],
];

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const html = ({ text, display, pending }) =>
  `<code class="math${pending ? "-pending" : ""}${display ? " display" : ""}">${escaped(text)}</code>`;

// While an answer streams in, a formula whose end has not come is shown as a pending one, not as stray signs.
let live = false;
export const setLive = (value) => (live = value);
const PENDING_BLOCK = /^ {0,3}(?:\$\$|\\\[)((?:(?!\n[ \t]*\n)[\s\S])*)$/;
const PENDING_INLINE = /^\\[([]([^\n]*)$/;

const blockMath = {
  name: "blockMath",
  level: "block",
  start: (source) => source.match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
  tokenizer(source) {
    const found = BLOCK.exec(source);
    const text = (found?.[1] ?? found?.[2] ?? "").trim();
    const open = !found && live ? PENDING_BLOCK.exec(source) : null;
    if (open) return { type: "blockMath", raw: open[0], text: open[1].trim(), display: true, pending: true };
    return text ? { type: "blockMath", raw: found[0], text, display: true } : undefined;
  },
  renderer: html,
};

const inlineMath = {
  name: "inlineMath",
  level: "inline",
  start: (source) => source.match(/\$|\\\(|\\\[/)?.index,
  tokenizer(source) {
    for (const [pattern, display] of INLINE) {
      const found = pattern.exec(source);
      if (found) return { type: "inlineMath", raw: found[0], text: found[1].trim(), display };
    }
    const open = live ? PENDING_INLINE.exec(source) : null;
    return open ? { type: "inlineMath", raw: open[0], text: open[1], display: false, pending: true } : undefined;
  },
  renderer: html,
};

// CommonMark does not close bold text whose last character is punctuation when a Chinese character follows at once
// (**注意：**请看), because it counts on spaces between words.
const CJK_STRONG = /^\*\*(?=[^\s*])([^*\n]*[\p{P}\p{S}])\*\*(?=[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}])/u;
const CJK_STRONG_OPENS = /^\*\*(?=[“‘「『《（【"'(])([^*\n]+)\*\*/u;

const cjkStrong = {
  name: "cjkStrong",
  level: "inline",
  start: (source) => source.match(/\*\*/)?.index,
  tokenizer(source) {
    const found = CJK_STRONG.exec(source) || CJK_STRONG_OPENS.exec(source);
    if (!found) return undefined;
    return { type: "cjkStrong", raw: found[0], text: found[1], tokens: this.lexer.inlineTokens(found[1]) };
  },
  renderer(token) {
    return `<strong>${this.parser.parseInline(token.tokens)}</strong>`;
  },
};

// 【3†title】 cites source 3 of what the tools read. Unknown sources stay as they were written.
const CITATION = /^【(\d{1,4})†([^】\n]{0,300})】/;
const PENDING_CITATION = /^【\d{1,4}(?:†[^】\n]{0,300})?$/;
let sources = new Map(); // number -> {number, url, title}
export const setSources = (value) => (sources = value);

const citation = {
  name: "citation",
  level: "inline",
  start: (source) => source.match(/【\d/)?.index,
  tokenizer(source) {
    const found = CITATION.exec(source);
    const known = found && sources.get(Number(found[1]));
    if (known) return { type: "citation", raw: found[0], source: known };
    const open = live ? PENDING_CITATION.exec(source) : null;
    return open ? { type: "citation", raw: open[0], source: null } : undefined;
  },
  renderer({ source }) {
    if (!source) return "";
    const { number, url, title } = source;
    return `<sup><a href="${escaped(url)}" title="${escaped(title || url)}">${number}</a></sup>`;
  },
};

export const EXTENSIONS = [blockMath, inlineMath, cjkStrong, citation];
