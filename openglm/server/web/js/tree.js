// A conversation is a tree of messages: editing or asking again adds a sibling, and nothing is lost. No document here.
//
// {id, title, named, created, updated, system, messages: [message], chosen: {parent id or "": child id}}
// message: {id, parent, role: "user", content, files: [{name, text}], time}
//       or {id, parent, role: "assistant", parts: [part], time, finish, stats}
// A file that was put on the server has an id in place of the text.
// part: {type: "text" | "reasoning", text}
//       or {type: "call", id, name, arguments, status, output, content, seconds, files, sources}
// A parent always stands before its children.

export const newId = () => {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
};

export function newConversation(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, system, messages: [], chosen: {} };
}

export const find = (conversation, id) => conversation.messages.find((message) => message.id === id) || null;

export function childrenOf(conversation, parent) {
  return conversation.messages.filter((message) => message.parent === parent);
}

/** The child that is shown below `parent` (null: the first message), or null. */
function chosenChild(conversation, parent, children = childrenOf(conversation, parent)) {
  const wanted = conversation.chosen[parent ?? ""];
  return children.find((child) => child.id === wanted) || children.at(-1) || null;
}

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const below = Map.groupBy
    ? Map.groupBy(conversation.messages, (message) => message.parent)
    : conversation.messages.reduce((map, m) => map.set(m.parent, [...(map.get(m.parent) || []), m]), new Map());
  const shown = [];
  let next = chosenChild(conversation, null, below.get(null) || []);
  while (next) {
    shown.push(next);
    next = chosenChild(conversation, next.id, below.get(next.id) || []);
  }
  return shown;
}

/** Messages from the first to this one, along its parents. */
export function pathTo(conversation, id) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const found = [];
  for (let message = byId.get(id); message; message = byId.get(message.parent)) found.unshift(message);
  return found;
}

/** Add a message below `parent` and show it. */
export function append(conversation, parent, message) {
  const added = { id: newId(), parent, time: Date.now(), ...message };
  conversation.messages.push(added);
  conversation.chosen[parent ?? ""] = added.id;
  conversation.updated = added.time;
  return added;
}

/** {ids, index} of the versions of a message. */
export function versions(conversation, id) {
  const message = find(conversation, id);
  const ids = childrenOf(conversation, message.parent).map((sibling) => sibling.id);
  return { ids, index: ids.indexOf(id) };
}

/** Show the version `step` places further, if there is one. */
export function switchVersion(conversation, id, step) {
  const { ids, index } = versions(conversation, id);
  const target = ids[index + step];
  if (target) conversation.chosen[find(conversation, id).parent ?? ""] = target;
  return target || null;
}

/** All text of a message, for search, copying and screen readers. */
export function textOf(message) {
  if (message.role === "user") return message.content;
  const text = message.parts.filter((part) => part.type === "text").map((part) => part.text.trim());
  return text.filter(Boolean).join("\n\n");
}

/** A title out of the first message: its first line, at most 48 characters. */
export function titleFrom(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  const characters = Array.from(line);
  return characters.length > 48 ? `${characters.slice(0, 47).join("")}…` : line;
}

/** Whether title or any message holds every word of the query. */
export function matches(conversation, query) {
  const words = query.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  const all = [conversation.title, ...conversation.messages.map(textOf)].join("\n").toLocaleLowerCase();
  return words.every((word) => all.includes(word));
}

/** The text of a user message as the model gets it: files first, each in a fence that its text cannot close. */
export function withFiles(message) {
  const here = (message.files || []).filter((file) => !file.id);
  const pieces = here.map(({ name, text }) => {
    const ticks = Math.max(2, ...Array.from(text.matchAll(/`+/g), (run) => run[0].length)) + 1;
    const fence = "`".repeat(ticks);
    return `${name.replace(/\s+/g, " ")}\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...pieces, message.content].filter(Boolean).join("\n\n");
}

/**
 * Messages in OpenAI's shape for the path that ends at a message. Reasoning is not sent again.
 * serverNames: the server itself names the files of the message that it answers.
 */
export function toRequest(conversation, lastId, serverNames) {
  const out = conversation.system.trim() ? [{ role: "system", content: conversation.system.trim() }] : [];
  for (const message of pathTo(conversation, lastId)) {
    if (message.role === "user") {
      const names = serverNames && message.id === lastId ? [] : (message.files || []).filter((file) => file.id).map((file) => file.name);
      const note = names.length ? `[files in the working folder: ${names.join(", ")}]` : "";
      out.push({ role: "user", content: [note, withFiles(message)].filter(Boolean).join("\n\n") });
    }
    else out.push(...assistantTurns(message.parts));
  }
  return out;
}

/** Text and calls of an answer, cut where results came in: assistant, tool ..., assistant. */
function assistantTurns(parts) {
  const out = [];
  let text = "";
  let calls = [];
  const flush = () => {
    if (!text && !calls.length) return;
    const turn = { role: "assistant", content: text };
    if (calls.length) {
      turn.tool_calls = calls.map((call) => ({
        id: call.id, type: "function", function: { name: call.name, arguments: call.arguments || "{}" },
      }));
    }
    out.push(turn, ...calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.content || "" })));
    text = "";
    calls = [];
  };
  for (const part of parts) {
    if (part.type === "call") calls.push(part);
    else if (part.type === "text" && part.text) {
      if (calls.length) flush();
      text += part.text;
    }
  }
  flush();
  return out;
}
