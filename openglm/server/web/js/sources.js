// Sources that tools read, and the marks in answers that cite them: 【3†title】 leads to source 3. No document here.

import { pathTo } from "./tree.js";

const MARK = /【(\d{1,4})†[^】\n]*】/g;
const MAX_SOURCES = 100;

/** Whether a source may be linked: pages of the web alone. */
function isPage(url) {
  try {
    return ["http:", "https:"].includes(new URL(url).protocol);
  } catch {
    return false;
  }
}

/** Checked sources [{number, url, title}] of whatever a server or an import says they are. */
export function sourcesIn(value) {
  if (!Array.isArray(value)) return [];
  const fine = (s) => s && Number.isInteger(s.number) && s.number >= 0 && typeof s.url === "string" && isPage(s.url);
  return value.slice(0, MAX_SOURCES).filter(fine).map(({ number, url, title }) => ({
    number, url: url.slice(0, 4000), title: String(title || "").slice(0, 300),
  }));
}

/** number -> source, of all that was read up to a message. */
export function sourcesUpTo(conversation, id) {
  const calls = pathTo(conversation, id).flatMap((message) => message.parts ?? []);
  return new Map(calls.flatMap((part) => part.sources ?? []).map((source) => [source.number, source]));
}

/** The sources that a text cites, each once, in the order of their marks. */
export function cited(text, sources) {
  const numbers = Array.from(text.matchAll(MARK), (mark) => Number(mark[1]));
  return Array.from(new Set(numbers), (number) => sources.get(number)).filter(Boolean);
}

/** A host without the www in front, for people. */
export const hostOf = (url) => new URL(url).host.replace(/^www\./, "");
