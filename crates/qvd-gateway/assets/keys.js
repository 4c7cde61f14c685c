// Keys that a browser or a telephone does not give: a panel, and typing by an
// on-screen keyboard.

import keysyms from "./novnc/core/input/keysymdef.js";
import KeyTable from "./novnc/core/input/keysym.js";

const element = (id) => document.getElementById(id);

// Names as `KeyboardEvent.code` has them.
const SYMS = {
  ControlLeft: KeyTable.XK_Control_L,
  AltLeft: KeyTable.XK_Alt_L,
  ShiftLeft: KeyTable.XK_Shift_L,
  MetaLeft: KeyTable.XK_Super_L,
  Escape: KeyTable.XK_Escape,
  Tab: KeyTable.XK_Tab,
  Delete: KeyTable.XK_Delete,
  Enter: KeyTable.XK_Return,
  Backspace: KeyTable.XK_BackSpace,
  ArrowLeft: KeyTable.XK_Left,
  ArrowUp: KeyTable.XK_Up,
  ArrowDown: KeyTable.XK_Down,
  ArrowRight: KeyTable.XK_Right,
  KeyC: KeyTable.XK_c,
};
for (let n = 1; n <= 12; n += 1) SYMS[`F${n}`] = KeyTable[`XK_F${n}`];

export function bindKeys(display) {
  const held = [...document.querySelectorAll("[data-hold]")];
  const key = (code, down) => display.rfb?.sendKey(SYMS[code], code, down);

  function release() {
    for (const button of held.filter((button) => button.ariaPressed === "true")) {
      button.ariaPressed = "false";
      key(button.dataset.hold, false);
    }
  }
  for (const button of held) {
    button.addEventListener("click", () => {
      const down = button.ariaPressed !== "true";
      button.ariaPressed = String(down);
      key(button.dataset.hold, down);
    });
  }
  for (const button of document.querySelectorAll("[data-keys]")) {
    button.addEventListener("click", () => {
      const codes = button.dataset.keys.split(" ");
      for (const code of codes) key(code, true);
      for (const code of codes.reverse()) key(code, false);
      release();
    });
  }
  document.addEventListener("qvd-disconnected", () => held.forEach((button) => { button.ariaPressed = "false"; }));

  // An on-screen keyboard edits text instead of pressing keys. The field is
  // kept full of a filler, so that there is always something to delete.
  const typing = element("typing");
  const toggle = element("touch-keyboard");
  const FILLER = "_".repeat(100);
  let before = FILLER;

  function refill() {
    typing.value = before = FILLER;
    typing.setSelectionRange(FILLER.length, FILLER.length);
  }
  function press(sym, code = "") {
    display.rfb?.sendKey(sym, code);
    release();
  }
  typing.addEventListener("input", (event) => {
    const after = typing.value;
    let same = 0;
    while (same < before.length && same < after.length && before[same] === after[same]) same += 1;
    for (let n = same; n < before.length; n += 1) press(SYMS.Backspace, "Backspace");
    for (const letter of after.slice(same)) {
      if (letter === "\n") press(SYMS.Enter, "Enter");
      else press(keysyms.lookup(letter.codePointAt(0)));
    }
    before = after;
    if (!event.isComposing && (after.length > 200 || after.length < 20)) refill();
  });
  typing.addEventListener("blur", () => { toggle.ariaPressed = "false"; });
  // Else the press itself would take the focus away and close the keyboard.
  toggle.addEventListener("pointerdown", (event) => event.preventDefault());
  toggle.addEventListener("click", () => {
    if (toggle.ariaPressed === "true") {
      typing.blur();
      return;
    }
    toggle.ariaPressed = "true";
    refill();
    if (display.rfb) display.rfb.focusOnClick = false;
    typing.focus();
  });
  typing.addEventListener("blur", () => { if (display.rfb) display.rfb.focusOnClick = true; });
}
