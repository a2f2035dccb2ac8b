// The only way by which HTML becomes part of the page: DOMPurify with a short list of tags, into document nodes.
// The page's policy (index.html) asks for trusted types, so a browser that knows them refuses any other way.

import "../vendor/dompurify/purify.min.js";

const { DOMPurify } = globalThis;

const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "img", "kbd", "li", "mark",
  "ol", "p", "pre", "span", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
];
const ATTRIBUTES = ["align", "alt", "class", "href", "src", "start", "title"];
const CLASS = /^(?:language-[\w+#.-]{1,40}|math|math-pending|display|hljs-[\w-]+|[a-z]+_{1,2})$/;

const TEXT = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ATTRIBUTES,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
// Formulas are nodes that KaTeX built: HTML for the eye, MathML for screen readers, a few drawn lines.
const FORMULA = { USE_PROFILES: { html: true, mathMl: true, svg: true }, ADD_TAGS: ["semantics", "annotation"], IN_PLACE: true };

/** Whether a link may be followed: http, https and mailto. */
export function isSafeLink(href) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(href, document.baseURI).protocol);
  } catch {
    return false;
  }
}

/** Whether a picture or file may be loaded: part of the page's own server, or data in the page. */
export function isLocal(src, image = true) {
  try {
    const url = new URL(src, document.baseURI);
    if (url.protocol === "data:") return image ? /^data:image\//i.test(src.trim()) : true;
    return url.protocol === "blob:" ? url.origin === location.origin : url.origin === location.origin;
  } catch {
    return false;
  }
}

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.closest?.(".formula")) return;
  if (node.hasAttribute("class")) {
    const kept = Array.from(node.classList).filter((name) => CLASS.test(name));
    if (kept.length) node.setAttribute("class", kept.join(" "));
    else node.removeAttribute("class");
  }
  if (node.tagName === "A") {
    if (!isSafeLink(node.getAttribute("href") ?? "")) node.removeAttribute("href");
    else {
      node.setAttribute("target", "_blank");
      node.setAttribute("rel", "noopener noreferrer nofollow");
    }
  } else if (node.tagName === "IMG") {
    const src = node.getAttribute("src") ?? "";
    if (isLocal(src)) node.setAttribute("loading", "lazy");
    else {
      // A foreign picture would tell its server that it was seen: a link, to be followed by choice.
      node.removeAttribute("src");
      node.setAttribute("data-foreign", isSafeLink(src) ? src : "");
    }
  }
});

/** HTML to a fragment; or nodes that KaTeX built, cleaned where they stand. */
export function sanitize(dirty) {
  if (dirty instanceof Node) return DOMPurify.sanitize(dirty, FORMULA);
  const fragment = DOMPurify.sanitize(dirty, TEXT);
  for (const image of fragment.querySelectorAll("img[data-foreign]")) {
    const link = document.createElement("a");
    const target = image.getAttribute("data-foreign");
    link.textContent = image.getAttribute("alt") || target;
    if (target) Object.assign(link, { href: target, target: "_blank", rel: "noopener noreferrer nofollow" });
    image.replaceWith(link);
  }
  return fragment;
}
