// Loads the page again when a part of its program did not arrive, as happens
// when the network changes meanwhile: without it nothing would ever move.
// Not a module, so that it runs before any is asked for.

(() => {
  const TRIES = 3;
  const WAIT_MS = 1000;
  const KEY = `tries ${location.pathname}`;
  let failed = false;

  window.addEventListener("error", (event) => {
    if (failed || event.target?.tagName !== "SCRIPT") return;
    failed = true;
    const tries = Number(sessionStorage.getItem(KEY));
    if (tries < TRIES) {
      sessionStorage.setItem(KEY, String(tries + 1));
      setTimeout(() => location.reload(), WAIT_MS);
      return;
    }
    sessionStorage.removeItem(KEY);
    document.getElementById("spinner").hidden = true;
    document.getElementById("headline").textContent = "This page is incomplete";
    document.getElementById("detail").textContent = "Parts of it could not be loaded. Load it again to go on.";
  }, true);
  window.addEventListener("qvd-loaded", () => sessionStorage.removeItem(KEY));
})();
