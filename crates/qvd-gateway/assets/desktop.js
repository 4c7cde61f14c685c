// One desktop's screen: opens it, shows what happens, comes back after a break.

import RFB from "./novnc/core/rfb.js";
import { shareClipboard } from "./clipboard.js";
import { bindKeys } from "./keys.js";
import { bindTools } from "./tools.js";

// Why the server closed the display; `portal/screen.rs` sends them.
const TAKEN_OVER = 4001;
const STOPPED = 4002;
const SIGNED_OUT = 4003;
const FAILED = 4005;

// Waits between attempts to come back, in milliseconds; the last one repeats.
const BACK_OFF = [300, 1000, 2000, 4000, 8000, 15000];
const GIVE_UP_AFTER = 40;
// Refusals that are taken for a display which is only just coming back.
const PATIENT = 5;
// A display that has not greeted us by then never will.
const GREETING_MS = 30000;
// A connection that held this long was a good one: the next wait is short again.
const GOOD_MS = 10000;

const element = (id) => document.getElementById(id);
const { desktop: id, name } = document.body.dataset;
const csrf = document.querySelector('meta[name="csrf"]').content;
const screen = element("screen");
const overlay = element("overlay");

/** What the rest of the page may do with the screen; `rfb` is null without one. */
export const display = { rfb: null, screen };

let attempts = 0;
let pending;

/** Shows the sheet. `again` names the button to go on; without it we are at work. */
function tell(headline, detail, again) {
  element("headline").textContent = headline;
  element("detail").textContent = detail;
  element("spinner").hidden = again !== undefined;
  const button = element("again");
  button.hidden = again === undefined;
  if (again !== undefined) button.textContent = again;
  overlay.hidden = false;
  element("tools").hidden = true;
  if (again !== undefined) button.focus();
}

function step(text) {
  const steps = element("steps");
  steps.hidden = false;
  if (steps.lastElementChild?.textContent === text) return;
  const line = document.createElement("li");
  line.textContent = text;
  steps.append(line);
}

function clearSteps() {
  element("steps").replaceChildren();
  element("steps").hidden = true;
}

function signIn() {
  location.assign(`/sign-in?next=/desktops/${id}`);
}

/** A refusal that trying again does not change. */
class Refused extends Error {}

/** Makes the desktop run; shows its steps. */
async function start() {
  const answer = await fetch(`/desktops/${id}/open`, {
    method: "POST",
    headers: { accept: "application/json", "x-csrf-token": csrf },
  });
  if (answer.status === 401) {
    signIn();
    throw new Refused("You are signed out.");
  }
  if (!answer.ok) {
    const { error } = await answer.json();
    const text = `${error.message} (reference ${error.id})`;
    throw answer.status >= 500 ? new Error(text) : new Refused(text);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const news = JSON.parse(line);
      if (news.ready) return;
      if (news.error) throw new Refused(`${news.error.message} (reference ${news.error.id})`);
      step(news.text);
    }
  }
}

/** The address of the display, with the size that the session should have. */
function address() {
  const { width, height } = screen.getBoundingClientRect();
  const size = new URLSearchParams({ width: Math.floor(width), height: Math.floor(height) });
  return `wss://${location.host}/desktops/${id}/display?${size}`;
}

function attach() {
  step("Opening the display");
  const socket = new WebSocket(address(), ["binary"]);
  let ended;
  socket.addEventListener("close", (event) => { ended ??= event; });
  const rfb = new RFB(screen, socket, { shared: true });
  rfb.background = "transparent";
  rfb.resizeSession = true;
  rfb.qualityLevel = 7;
  rfb.compressionLevel = 2;
  let watch = setTimeout(() => rfb.disconnect(), GREETING_MS);
  rfb.addEventListener("connect", () => {
    clearTimeout(watch);
    watch = setTimeout(() => { attempts = 0; }, GOOD_MS);
    overlay.hidden = true;
    clearSteps();
    element("tools").hidden = false;
    display.rfb = rfb;
    rfb.focus();
    document.dispatchEvent(new Event("qvd-connected"));
  });
  rfb.addEventListener("disconnect", () => {
    clearTimeout(watch);
    display.rfb = null;
    document.dispatchEvent(new Event("qvd-disconnected"));
    // The socket's own event says why; it may come a moment after noVNC's.
    setTimeout(() => over(ended?.code ?? 1006, ended?.reason ?? ""), 0);
  });
  rfb.addEventListener("clipboard", (event) => clipboard.received(event.detail.text));
}

function over(code, reason) {
  clearSteps();
  if (leaving) return;
  switch (code) {
    case TAKEN_OVER:
      tell("Opened on another screen", `${name} was taken over by another browser or device. Your programs keep running there.`, "Use it here");
      break;
    case STOPPED:
      tell("The desktop was stopped", `${name} does not run any more. Your files are kept.`, "Start it again");
      break;
    case SIGNED_OUT:
      signIn();
      break;
    case FAILED:
      // What just broke off may be coming up again.
      if (attempts > 0 && attempts < PATIENT) {
        comeBack();
        break;
      }
      tell("The desktop cannot be shown", `${capital(reason)}.`, "Try again");
      break;
    default:
      comeBack();
  }
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** Tries again later, longer each time. */
function comeBack() {
  if (attempts >= GIVE_UP_AFTER) {
    tell("No connection", "The server cannot be reached. Your desktop keeps running.", "Try again");
    return;
  }
  const wait = BACK_OFF[Math.min(attempts, BACK_OFF.length - 1)];
  attempts += 1;
  const soon = wait < 1000 ? "" : ` Next attempt in ${wait / 1000} seconds.`;
  tell("Reconnecting…", `The connection was lost. Your desktop keeps running.${soon}`);
  clearTimeout(pending);
  pending = setTimeout(connect, wait);
}

let connecting = false;

async function connect() {
  clearTimeout(pending);
  if (connecting || display.rfb || leaving) return;
  connecting = true;
  try {
    await start();
    attach();
  } catch (error) {
    clearSteps();
    if (error instanceof Refused) {
      tell("The desktop cannot be opened", capital(error.message), "Try again");
    } else {
      comeBack();
    }
  } finally {
    connecting = false;
  }
}

let leaving = false;

function leave() {
  leaving = true;
  display.rfb?.disconnect();
  location.assign("/desktops");
}

const clipboard = shareClipboard(display);
bindKeys(display);
bindTools(display, { leave });

element("again").addEventListener("click", () => {
  attempts = 0;
  tell(name, "Connecting…");
  connect();
});
// What ended an absence also ends the waiting.
const now = () => { if (!overlay.hidden && element("again").hidden) connect(); };
window.addEventListener("online", now);
document.addEventListener("visibilitychange", () => !document.hidden && attempts > 0 && now());
window.addEventListener("pagehide", () => { leaving = true; });
window.addEventListener("pageshow", (event) => event.persisted && location.reload());

window.dispatchEvent(new Event("qvd-loaded"));
connect();
