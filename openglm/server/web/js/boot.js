// Before the first paint: theme and language as last chosen, so that nothing flashes. A classic script on purpose.
(() => {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem("openglm-settings")) || {};
  } catch {
    // no storage, or not ours: the defaults serve
  }
  const root = document.documentElement;
  if (kept.theme === "light" || kept.theme === "dark") root.dataset.theme = kept.theme;
  const chinese = kept.language ? kept.language === "zh" : /^zh\b/i.test(navigator.language || "");
  root.lang = chinese ? "zh-CN" : "en";
})();
