// The clipboard, both ways: by itself where the browser lets us, else by a panel.

const element = (id) => document.getElementById(id);

/** Whether the browser lets this page use its clipboard without being asked. */
async function state(permission) {
  try {
    return (await navigator.permissions.query({ name: permission })).state;
  } catch {
    return "unknown";
  }
}

export function shareClipboard(display) {
  const text = element("clipboard-text");
  const note = element("clipboard-note");
  const share = element("clipboard-share");
  let known = "";

  function send(value) {
    if (!display.rfb || value === known) return;
    known = value;
    display.rfb.clipboardPasteFrom(value);
  }

  /** What was copied here goes to the desktop when the person returns to it. */
  async function read() {
    if (!display.rfb || !document.hasFocus() || (await state("clipboard-read")) !== "granted") return;
    try {
      const value = await navigator.clipboard.readText();
      if (value) {
        text.value = value;
        send(value);
      }
    } catch {
      // The page lost the focus meanwhile: the next return asks again.
    }
  }

  async function write(value) {
    try {
      await navigator.clipboard.writeText(value);
      note.textContent = "Copied to this device.";
    } catch {
      note.textContent = "Your browser keeps its clipboard to itself: press “Copy here”.";
    }
  }

  async function explain() {
    const reading = await state("clipboard-read");
    share.hidden = reading !== "prompt";
    if (reading === "granted") note.textContent = "Copying and pasting works by itself in this browser.";
    else if (reading === "prompt") note.textContent = "Allow sharing, and copying and pasting works by itself.";
    else note.textContent = "This browser shares its clipboard only when you press a button.";
  }

  share.addEventListener("click", async () => {
    try {
      send(await navigator.clipboard.readText());
    } catch {
      // A refusal is shown by what `explain` finds.
    }
    explain();
  });
  element("clipboard-send").addEventListener("click", () => {
    known = "";
    send(text.value);
    note.textContent = "Sent: paste it in the desktop.";
    display.rfb?.focus();
  });
  element("clipboard-copy").addEventListener("click", async () => {
    text.select();
    await write(text.value);
  });
  window.addEventListener("focus", read);
  display.screen.addEventListener("pointerenter", read);
  document.addEventListener("qvd-connected", read);
  document.addEventListener("qvd-panel", explain);

  return {
    /** The desktop has copied something. */
    received(value) {
      known = value;
      text.value = value;
      if (document.hasFocus()) write(value);
    },
  };
}
