// What the browser keeps: conversations in IndexedDB, settings in localStorage. Nothing leaves the machine.
// Imported files are foreign data: `parseImport` builds every object anew out of checked fields.

import { sourcesIn } from "./sources.js";
import { newId } from "./tree.js";

const NAME = "openglm";
const TABLE = "conversations";
export const EXPORT_FORMAT = "openglm-conversations";
export const MAX_IMPORT_BYTES = 32 * 1024 * 1024;
const LIMITS = { conversations: 5000, messages: 10_000, parts: 1000, files: 100, text: 4_000_000, short: 400 };

let database = null;
let onTrouble = () => {};
const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;

/** trouble("full" | "none"): storage is full, or there is none and conversations last only as long as the page. */
export function onStorageTrouble(trouble) {
  onTrouble = trouble;
}

/** changed({id}): another tab saved or deleted a conversation. */
export function onOtherTab(changed) {
  channel?.addEventListener("message", (event) => changed(event.data));
}

export async function open() {
  try {
    database = await new Promise((resolve, reject) => {
      const asked = indexedDB.open(NAME, 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore(TABLE, { keyPath: "id" });
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => reject(asked.error);
      asked.onblocked = () => reject(new Error("blocked"));
    });
    database.onversionchange = () => database.close();
  } catch {
    database = null;
    onTrouble("none");
  }
}

function transact(mode, work) {
  if (!database) return Promise.resolve(null);
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(TABLE, mode);
    const asked = work(transaction.objectStore(TABLE));
    transaction.oncomplete = () => resolve(asked?.result ?? null);
    transaction.onerror = () => reject(transaction.error);
    transaction.onabort = () => reject(transaction.error || new Error("aborted"));
  });
}

/** All conversations, the last used first. */
export async function all() {
  const found = (await transact("readonly", (table) => table.getAll())) || [];
  return found.sort((a, b) => b.updated - a.updated);
}

export const one = (id) => transact("readonly", (table) => table.get(id));

async function write(work, id) {
  try {
    await transact("readwrite", work);
    channel?.postMessage({ id });
    return true;
  } catch (error) {
    onTrouble(error?.name === "QuotaExceededError" ? "full" : "failed");
    return false;
  }
}

/** Resolves to whether it was kept. */
export const save = (conversation) => write((table) => table.put(conversation), conversation.id);
export const remove = (id) => write((table) => table.delete(id), id);

// ---------------------------------------------------------------- settings

const SETTINGS = "openglm-settings";
const DEFAULTS = { theme: "auto", language: "", sampling: {}, system: "", allTools: false, askTools: false };

export function loadSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(SETTINGS)) || {};
    const sampling = kept.sampling && typeof kept.sampling === "object" ? kept.sampling : {};
    return { ...DEFAULTS, ...kept, sampling: { ...sampling }, system: String(kept.system ?? "") };
  } catch {
    return { ...DEFAULTS, sampling: {} };
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    onTrouble("full");
  }
}

// ---------------------------------------------------------------- export and import

export function exportText(conversations) {
  const head = { format: EXPORT_FORMAT, version: 1, exported: new Date().toISOString() };
  return JSON.stringify({ ...head, conversations }, null, 1);
}

/** message: the first field that is not as an export has it. */
export class BadImport extends Error {}

function check(fine, where) {
  if (!fine) throw new BadImport(where);
}

const text = (value, where, limit = LIMITS.text) => {
  check(typeof value === "string" && value.length <= limit, where);
  return value;
};
const list = (value, where, limit) => {
  check(Array.isArray(value) && value.length <= limit, where);
  return value;
};
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const time = (value) => Math.min(Math.max(number(value) ?? Date.now(), 0), Date.now());
const oneOf = (value, known, otherwise) => (known.includes(value) ? value : otherwise);

/** Conversations of an export, with fresh ids. Throws an Error whose message names the first field that is wrong. */
export function parseImport(source) {
  let data;
  try {
    data = JSON.parse(source);
  } catch {
    throw new BadImport("JSON");
  }
  check(data && typeof data === "object" && data.format === EXPORT_FORMAT, "format");
  check(data.version === 1, "version");
  return list(data.conversations, "conversations", LIMITS.conversations).map((c, i) => conversationOf(c, `conversations[${i}]`));
}

function conversationOf(value, where) {
  check(value && typeof value === "object", where);
  const ids = new Map(); // theirs -> ours
  const messages = list(value.messages, `${where}.messages`, LIMITS.messages).map((message, i) => {
    const at = `${where}.messages[${i}]`;
    check(message && typeof message === "object", at);
    const parent = message.parent ?? null;
    check(parent === null || ids.has(parent), `${at}.parent`); // a parent stands first, so nothing goes in circles
    check(typeof message.id === "string" && !ids.has(message.id), `${at}.id`);
    ids.set(message.id, newId());
    const base = { id: ids.get(message.id), parent: parent === null ? null : ids.get(parent), time: time(message.time) };
    return { ...base, ...(message.role === "user" ? userOf(message, at) : assistantOf(message, at)) };
  });
  const chosen = {};
  for (const [parent, child] of Object.entries(value.chosen ?? {})) {
    const known = parent === "" || ids.has(parent);
    if (known && ids.has(child)) chosen[parent === "" ? "" : ids.get(parent)] = ids.get(child);
  }
  return {
    id: newId(), title: text(value.title ?? "", `${where}.title`, LIMITS.short), named: Boolean(value.named),
    created: time(value.created), updated: time(value.updated),
    system: text(value.system ?? "", `${where}.system`), messages, chosen,
  };
}

function userOf(message, at) {
  const files = list(message.files ?? [], `${at}.files`, LIMITS.files).map((file) => {
    check(file && typeof file === "object", `${at}.files`);
    const name = text(file.name, `${at}.files.name`, LIMITS.short);
    if (typeof file.id === "string") return { name, id: text(file.id, `${at}.files.id`, LIMITS.short), text: "" };
    return { name, text: text(file.text, `${at}.files.text`) };
  });
  return { role: "user", content: text(message.content, `${at}.content`), files };
}

function assistantOf(message, at) {
  check(message.role === "assistant", `${at}.role`);
  const parts = list(message.parts, `${at}.parts`, LIMITS.parts).map((part) => partOf(part, `${at}.parts`));
  const known = ["stop", "length", "tool_calls", "stopped", "error"];
  const out = { role: "assistant", parts, finish: oneOf(message.finish, known, "stopped"), stats: null };
  if (message.stats && typeof message.stats === "object") {
    const names = ["tokens", "tok_s", "prefill_s", "context", "first_s"];
    out.stats = Object.fromEntries(names.map((name) => [name, number(message.stats[name])]));
  }
  if (out.finish === "error") {
    const error = message.error && typeof message.error === "object" ? message.error : {};
    out.error = { status: number(error.status) ?? -1, text: String(error.text ?? "").slice(0, 2000), retryAfter: null };
  }
  if (typeof message.model === "string") out.model = message.model.slice(0, LIMITS.short);
  return out;
}

function partOf(part, at) {
  check(part && typeof part === "object", at);
  if (part.type === "text") return { type: "text", text: text(part.text, `${at}.text`) };
  if (part.type === "reasoning") {
    return { type: "reasoning", text: text(part.text, `${at}.text`), seconds: number(part.seconds) };
  }
  check(part.type === "call", `${at}.type`);
  const files = list(part.files ?? [], `${at}.files`, LIMITS.files).map((file) => {
    check(file && typeof file === "object", `${at}.files`);
    const short = (name) => text(file[name], `${at}.files.${name}`, LIMITS.short);
    return { name: short("name"), mime: short("mime"), url: text(file.url, `${at}.files.url`) };
  });
  return {
    type: "call", id: text(part.id, `${at}.id`, LIMITS.short), index: number(part.index) ?? 0,
    name: text(part.name, `${at}.name`, LIMITS.short), arguments: text(part.arguments ?? "", `${at}.arguments`),
    status: oneOf(part.status, ["ok", "error", "refused", "denied", "repeated", "cut", "stopped"], "stopped"),
    content: text(part.content ?? "", `${at}.content`), seconds: number(part.seconds), files,
    output: text(part.output ?? "", `${at}.output`), sources: sourcesIn(part.sources),
  };
}
