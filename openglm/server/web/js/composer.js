// The box to write in: Enter sends (never while an input method composes). Files go along as text; where the server's
// tools are on, they go to the server, into the folder where the tools work.

import { uploadFile } from "./api.js";
import { byId, h, icon, iconButton, isComposing, toast } from "./dom.js";
import { t } from "./i18n.js";

const MAX_FILE_BYTES = 512 * 1024;
const MAX_UPLOAD_BYTES = 32 * 1024 * 1024;
const MAX_FILES = 10;

export class Composer {
  /** send(text, files) answers whether it was taken. toServer(): whether files go to the server. */
  constructor(send, toServer) {
    this.send = send;
    this.toServer = toServer;
    this.files = [];
    this.input = byId("input");
    this.form = byId("composer");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
      event.preventDefault();
      this.submit();
    });
    this.input.addEventListener("input", () => this.resize());
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", (event) => {
      this.addFiles(event.target.files);
      event.target.value = "";
    });
    this.input.addEventListener("paste", (event) => {
      if (!event.clipboardData?.files.length) return;
      event.preventDefault();
      this.addFiles(event.clipboardData.files);
    });
    this.acceptDrops();
  }

  acceptDrops() {
    const area = byId("chat");
    const veil = byId("drop");
    const holdsFiles = (event) => Array.from(event.dataTransfer?.types ?? []).includes("Files");
    area.addEventListener("dragover", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      veil.hidden = false;
    });
    area.addEventListener("dragleave", (event) => {
      if (!area.contains(event.relatedTarget)) veil.hidden = true;
    });
    area.addEventListener("drop", (event) => {
      veil.hidden = true;
      if (!holdsFiles(event)) return;
      event.preventDefault();
      this.addFiles(event.dataTransfer.files);
    });
    // A file that misses the area must not replace the page.
    for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => holdsFiles(event) && event.preventDefault());
  }

  submit() {
    const text = this.input.value.trim();
    if (this.files.some((file) => file.busy)) return toast(t("stillUploading"));
    const files = this.files.map(({ source, ...file }) => file);
    if ((!text && !files.length) || !this.send(text, files)) return;
    this.fill("");
    this.files = [];
    this.drawFiles();
  }

  /** Put a text into the box. */
  fill(text) {
    this.input.value = text;
    this.resize();
    this.input.focus();
  }

  resize() {
    if (CSS.supports("field-sizing", "content")) return;
    this.input.style.height = "auto";
    this.input.style.height = `${this.input.scrollHeight}px`;
  }

  async addFiles(list) {
    for (const file of Array.from(list)) {
      if (this.files.length >= MAX_FILES) {
        toast(t("tooManyFiles", { n: MAX_FILES }));
        break;
      }
      if (this.toServer()) this.upload(file);
      else if (file.size > MAX_FILE_BYTES) toast(t("fileTooBig", { name: file.name, n: MAX_FILE_BYTES / 1024 }));
      else {
        const text = decode(new Uint8Array(await file.arrayBuffer()));
        if (text === null) toast(t("fileNoText", { name: file.name }));
        else this.files.push({ name: file.name, text, source: file });
      }
    }
    this.drawFiles();
    this.input.focus();
  }

  /** Take the files again, after it has changed where they go. */
  moveFiles() {
    const sources = this.files.map((file) => file.source);
    this.files = [];
    return this.addFiles(sources);
  }

  async upload(file) {
    if (file.size > MAX_UPLOAD_BYTES) return toast(t("fileTooBig", { name: file.name, n: MAX_UPLOAD_BYTES / 1024 }));
    const entry = { name: file.name, text: "", busy: true, source: file };
    this.files.push(entry);
    this.drawFiles();
    try {
      entry.id = await uploadFile(file);
      delete entry.busy;
    } catch (error) {
      this.files = this.files.filter((other) => other !== entry);
      toast(t("uploadFailed", { name: file.name, why: error.message }), null, 10);
    }
    return this.drawFiles();
  }

  drawFiles() {
    const chip = (file) => {
      const remove = () => {
        this.files = this.files.filter((other) => other !== file);
        this.drawFiles();
        this.input.focus();
      };
      const close = iconButton("close", t("removeFile", { name: file.name }), remove);
      const busy = file.busy ? "true" : null;
      return h("li", { class: "chip", "aria-busy": busy }, icon("file"), h("span", { text: file.name }), close);
    };
    byId("attachments").replaceChildren(...this.files.map(chip));
  }
}

/** Bytes as text: UTF-8, UTF-16 with its mark, or GB 18030; null for what is no text. */
export function decode(bytes) {
  const marked = (bytes[0] === 0xff && bytes[1] === 0xfe && "utf-16le") || (bytes[0] === 0xfe && bytes[1] === 0xff && "utf-16be");
  if (!marked && bytes.includes(0)) return null;
  for (const encoding of marked ? [marked] : ["utf-8", "gb18030"]) {
    try {
      const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
      if (!/[\u0000-\u0008\u000e-\u001a]/.test(text)) return text;
    } catch {
      // not this encoding
    }
  }
  return null;
}
