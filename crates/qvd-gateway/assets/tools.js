// The toolbar over the screen, its panels and shortcuts.

const element = (id) => document.getElementById(id);

export function bindTools(display, { leave }) {
  const toolbar = element("toolbar");
  const handle = element("handle");
  const panels = [...document.querySelectorAll("[data-panel]")];

  function showPanel(id) {
    for (const button of panels) {
      const open = button.dataset.panel === id && button.ariaExpanded !== "true";
      button.ariaExpanded = String(open);
      element(button.dataset.panel).hidden = !open;
      if (open) document.dispatchEvent(new Event("qvd-panel"));
    }
  }
  function showTools(open) {
    toolbar.hidden = !open;
    handle.ariaExpanded = String(open);
    if (!open) {
      showPanel(null);
      display.rfb?.focus();
    }
  }
  handle.addEventListener("click", () => showTools(toolbar.hidden));
  for (const button of panels) button.addEventListener("click", () => showPanel(button.dataset.panel));

  const full = element("fullscreen");
  full.hidden = !document.fullscreenEnabled;
  async function fullscreen() {
    if (document.fullscreenElement) {
      await document.exitFullscreen();
      return;
    }
    await document.documentElement.requestFullscreen({ navigationUI: "hide" });
    // In full screen the desktop gets Escape, Alt+Tab and the like as well,
    // where the browser offers it; holding Escape leaves.
    await navigator.keyboard?.lock?.().catch(() => {});
  }
  full.addEventListener("click", () => fullscreen().catch(() => { full.disabled = true; }));
  document.addEventListener("fullscreenchange", () => {
    const now = document.fullscreenElement !== null;
    full.querySelector("span").textContent = now ? "Window" : "Full screen";
    if (!now) navigator.keyboard?.unlock?.();
    showTools(false);
  });

  // A desktop that cannot take our size is scaled; else only on request.
  const fit = element("fit");
  function scale(on) {
    fit.ariaPressed = String(on);
    if (display.rfb) display.rfb.scaleViewport = on;
  }
  fit.addEventListener("click", () => scale(fit.ariaPressed !== "true"));
  document.addEventListener("qvd-connected", () => {
    if (display.rfb && fit.ariaPressed === "true") display.rfb.scaleViewport = true;
    setTimeout(() => {
      const canvas = display.screen.querySelector("canvas");
      const { clientWidth, clientHeight } = display.screen;
      if (canvas && (canvas.width > clientWidth + 8 || canvas.height > clientHeight + 8)) scale(true);
    }, 2000);
  });

  element("disconnect").addEventListener("click", leave);

  // With three modifiers: no program's shortcut, and before noVNC sees it.
  const shortcuts = {
    KeyM: () => showTools(toolbar.hidden),
    KeyF: () => fullscreen().catch(() => {}),
    KeyK: () => { showTools(true); showPanel("keys"); },
    KeyV: () => { showTools(true); showPanel("clipboard"); element("clipboard-text").focus(); },
    KeyQ: leave,
  };
  window.addEventListener("keydown", (event) => {
    const run = event.ctrlKey && event.altKey && event.shiftKey && shortcuts[event.code];
    if (run && !element("tools").hidden) {
      event.preventDefault();
      event.stopImmediatePropagation();
      for (const [sym, code] of [[0xffe3, "ControlLeft"], [0xffe9, "AltLeft"], [0xffe1, "ShiftLeft"]]) {
        display.rfb?.sendKey(sym, code, false);
      }
      run();
    } else if (event.key === "Escape" && element("tools").contains(event.target)) {
      showTools(false);
    }
  }, true);
  // Pointing at the desktop again puts the tools away.
  display.screen.addEventListener("pointerdown", () => { if (!toolbar.hidden) showTools(false); }, true);
  document.addEventListener("qvd-disconnected", () => { toolbar.hidden = true; handle.ariaExpanded = "false"; showPanel(null); });
}
