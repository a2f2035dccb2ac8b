// The page: starts everything, holds what is open, and passes wishes between the views.

import { describeModel, onKeyNeeded } from "./api.js";
import { ChatView, drawExamples } from "./chat.js";
import { Composer } from "./composer.js";
import { byId, download, icon, toast } from "./dom.js";
import { FillView } from "./fill.js";
import { setLanguage, t, translate } from "./i18n.js";
import { errorText, rounded } from "./message.js";
import { askKey, SettingsDrawer } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { running, settle, stop } from "./turn.js";
import { newConversation } from "./tree.js";

const settings = store.loadSettings();
const conversations = new Map(); // id -> conversation; a new one comes in with its first message
let model = null;
let chat = null;
let sidebar = null;
let fill = null;
let composer = null;

// ---------------------------------------------------------------- where we are

/** Addresses hold an id or the name of a view, never anything that was written. */
function go(hash, replace = false) {
  if (location.hash === hash || (!hash && !location.hash)) return route();
  const url = hash || location.pathname + location.search;
  history[replace ? "replaceState" : "pushState"](null, "", url);
  return route();
}

function route() {
  const id = /^#c=([0-9a-f]+)$/.exec(location.hash)?.[1];
  const blanks = location.hash === "#fill";
  byId("fill").hidden = !blanks;
  byId("chat").hidden = blanks;
  byId("open-fill").setAttribute("aria-current", blanks ? "page" : "false");
  if (!blanks) {
    if (conversations.has(id)) chat.show(conversations.get(id));
    else if (!chat.conversation || conversations.has(chat.conversation.id)) chat.show(newConversation(settings.system));
    else chat.show(chat.conversation);
  }
  drawHead();
  sidebar.draw();
}

const inFill = () => location.hash === "#fill";
const currentId = () => (inFill() ? null : chat.conversation?.id);

function drawHead() {
  const title = inFill() ? t("fillTitle") : chat.conversation?.title || t("newChat");
  byId("title").textContent = title;
  document.title = `${title} · OpenGLM`;
  drawStatus();
}

function drawStatus() {
  byId("model").textContent = model?.id ?? "";
  const stats = inFill() ? null : chat.lastStats()?.stats;
  byId("speed").textContent = stats?.tok_s ? t("speed", { n: rounded(stats.tok_s) }) : "";
  const total = model?.context_length;
  const known = Boolean(stats?.context && total);
  byId("context").hidden = !known;
  if (!known) return;
  const share = Math.min(1, stats.context / total);
  byId("context").title = t("contextUsed");
  byId("context").querySelector(".meter > span").style.width = `${Math.max(3, share * 100)}%`;
  byId("context").querySelector(".figure").textContent = `${stats.context.toLocaleString("en")} / ${total.toLocaleString("en")}`;
}

// ---------------------------------------------------------------- conversations

function keep(conversation) {
  const fresh = !conversations.has(conversation.id);
  conversations.set(conversation.id, conversation);
  if (fresh && chat.conversation === conversation && !inFill()) {
    history.replaceState(null, "", `#c=${conversation.id}`);
  }
  return store.save(conversation);
}

const sorted = () => Array.from(conversations.values()).sort((a, b) => b.updated - a.updated);

function removeOne(id) {
  const conversation = conversations.get(id);
  if (!conversation) return;
  stop(id);
  conversations.delete(id);
  store.remove(id);
  if (id === currentId()) newChat();
  else sidebar.draw();
  toast(t("removed"), {
    text: t("undo"),
    run: () => {
      keep(conversation);
      sidebar.draw();
    },
  }, 8);
}

function newChat() {
  chat.conversation = newConversation(settings.system);
  go("");
  byId("input").focus();
}

function exportSome(list, name) {
  download(`${name}.json`, store.exportText(list));
}

async function importFile(file) {
  try {
    if (file.size > store.MAX_IMPORT_BYTES) throw new Error(t("importTooBig"));
    const found = store.parseImport(await file.text());
    for (const conversation of found) await keep(conversation);
    toast(t("imported", { n: found.length }));
    sidebar.draw();
  } catch (error) {
    const why = error instanceof store.BadImport ? t("importBad", { field: error.message }) : error.message;
    toast(t("importFailed", { why }), null, 10);
  }
}

async function otherTab({ id }) {
  if (running.has(id)) return;
  const found = await store.one(id);
  if (found) conversations.set(id, found);
  else conversations.delete(id);
  if (found && id === currentId()) chat.show(found);
  drawHead();
  sidebar.draw();
}

// ---------------------------------------------------------------- appearance

const THEMES = ["auto", "light", "dark"];

function drawSwitches() {
  const button = byId("theme");
  const label = `${t("theme")}: ${t(`theme_${settings.theme}`)}`;
  button.replaceChildren(icon({ auto: "auto", light: "sun", dark: "moon" }[settings.theme]));
  button.title = label;
  button.setAttribute("aria-label", label);
  byId("language").textContent = settings.language === "zh" ? "English" : "中文";
  byId("language").lang = settings.language === "zh" ? "en" : "zh-CN";
}

function setTheme(theme) {
  settings.theme = THEMES.includes(theme) ? theme : "auto";
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
  store.saveSettings(settings);
  drawSwitches();
}

function chooseLanguage(language) {
  settings.language = language === "zh" ? "zh" : "en";
  setLanguage(settings.language);
  store.saveSettings(settings);
  translate(document.body);
  drawSwitches();
  drawStart();
  fill.draw();
  chat.views.clear();
  route();
}

// ---------------------------------------------------------------- start

async function findModel() {
  try {
    model = await describeModel();
  } catch (error) {
    toast(errorText({ status: error.status ?? -1, text: error.message }), { text: t("tryAgain"), run: findModel }, 20);
  }
  byId("all-tools").hidden = !model?.all_tools;
  if (model?.fills === false) drawStart();
  drawStatus();
  fill.drawState();
}

const usesTools = () => Boolean(model?.all_tools && settings.allTools);

function drawStart() {
  const blank = model?.fills === false ? null : () => go("#fill");
  drawExamples((text) => composer.fill(text), blank);
}

function drawAllTools() {
  byId("all-tools").setAttribute("aria-pressed", String(Boolean(settings.allTools)));
}

function makeViews() {
  chat = new ChatView({
    settings,
    save: keep,
    allTools: usesTools,
    changed: () => {
      drawHead();
      sidebar?.draw();
    },
  });
  composer = new Composer((text, files) => {
    if (running.has(chat.conversation.id)) return false;
    chat.send(text, files);
    return true;
  }, usesTools);
  fill = new FillView({ model: () => model });
  sidebar = new Sidebar({
    conversations: sorted,
    current: currentId,
    running: (id) => running.has(id),
    open: (id) => {
      sidebar.setOpen(false, false);
      go(`#c=${id}`);
    },
    rename: (id, title) => {
      Object.assign(conversations.get(id), { title, named: true });
      store.save(conversations.get(id));
      drawHead();
    },
    exportOne: (id) => exportSome([conversations.get(id)], "openglm-conversation"),
    remove: removeOne,
  });
  new SettingsDrawer({
    settings,
    saveSettings: () => store.saveSettings(settings),
    system: () => chat.conversation.system,
    setSystem: (text) => {
      settings.system = chat.conversation.system = text;
      store.saveSettings(settings);
      if (conversations.has(chat.conversation.id)) store.save(chat.conversation);
    },
    model: () => model,
    setTheme,
    setLanguage: chooseLanguage,
    exportAll: () => exportSome(sorted(), "openglm-conversations"),
    importFile,
    removeAll: () => {
      for (const id of Array.from(conversations.keys())) {
        stop(id);
        conversations.delete(id);
        store.remove(id);
      }
      newChat();
    },
  });
}

function listen() {
  byId("new-chat").addEventListener("click", () => {
    sidebar.setOpen(false, false);
    newChat();
  });
  byId("open-fill").addEventListener("click", () => {
    sidebar.setOpen(false, false);
    go("#fill");
    byId("fill-input").focus();
  });
  byId("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(settings.theme) + 1) % THEMES.length]));
  byId("language").addEventListener("click", () => chooseLanguage(settings.language === "zh" ? "en" : "zh"));
  byId("all-tools").addEventListener("click", () => {
    settings.allTools = !settings.allTools;
    store.saveSettings(settings);
    drawAllTools();
    composer.moveFiles();
  });
  addEventListener("popstate", route);
  addEventListener("hashchange", route);
  addEventListener("pagehide", () => {
    for (const id of running.keys()) store.save(conversations.get(id));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      sidebar.setOpen(true, false);
      byId("search").focus();
    }
  });
  store.onOtherTab(otherTab);
}

async function start() {
  settings.language ||= document.documentElement.lang === "zh-CN" ? "zh" : "en";
  setLanguage(settings.language);
  translate(document.body);
  onKeyNeeded(askKey);
  const troubles = { full: "storageFull", none: "storageNone", failed: "storageFailed" };
  let told = null;
  store.onStorageTrouble((kind) => {
    if (told === kind) return;
    told = kind;
    toast(t(troubles[kind]), null, 12);
  });
  makeViews();
  setTheme(settings.theme);
  drawAllTools();
  drawStart();
  await store.open();
  for (const conversation of await store.all()) {
    settle(conversation);
    conversations.set(conversation.id, conversation);
  }
  route();
  listen();
  if (!inFill() && matchMedia("(pointer: fine)").matches) byId("input").focus();
  document.documentElement.dataset.ready = "1";
  await findModel();
}

start();
