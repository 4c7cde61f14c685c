// Keeps the list of desktops up to date, and asks before one is stopped.

const EVERY_MS = 3000;
const EVERY_BUSY_MS = 1000;

const csrf = document.querySelector('meta[name="csrf"]').content;
const problem = document.querySelector("#problem");
const news = document.querySelector("#news");
const cards = () => [...document.querySelectorAll("li[data-desktop]")];

function complain(text) {
  problem.textContent = text;
  problem.hidden = text === "";
}

/** Shows what a desktop is doing; a change is also told to screen readers. */
function show(card, row) {
  const label = card.querySelector(".label");
  if (label.textContent !== row.label) {
    label.textContent = row.label;
    news.textContent = `${row.name}: ${row.label}`;
  }
  card.dataset.state = row.state;
  card.dataset.attached = row.attached;
  card.querySelector("form.stop").hidden = !row.running;
}

let timer;
let offline = false;

async function refresh() {
  clearTimeout(timer);
  if (document.hidden) return;
  let wait = EVERY_MS;
  try {
    const answer = await fetch("/desktops/state", { headers: { accept: "application/json" } });
    if (answer.status === 401) {
      location.assign("/sign-in");
      return;
    }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const rows = await answer.json();
    if (offline) complain("");
    offline = false;
    const shown = new Map(cards().map((card) => [card.dataset.desktop, card]));
    const blocked = (card) => "blocked" in card.dataset;
    // Desktops that came, went or were closed change what can be done: a new page.
    const same = rows.length === shown.size
      && rows.every((row) => shown.has(String(row.id)) && blocked(shown.get(String(row.id))) === row.blocked);
    if (!same && !document.querySelector("dialog[open]")) {
      location.reload();
      return;
    }
    for (const row of rows) {
      const card = shown.get(String(row.id));
      if (card) show(card, row);
      if (row.state === "starting" || row.state === "stopping") wait = EVERY_BUSY_MS;
    }
  } catch {
    offline = true;
    complain("The server does not answer. Trying again…");
  }
  timer = setTimeout(refresh, wait);
}

/** Asks in a dialog; resolves to whether to go on. */
function confirmed(name) {
  const dialog = document.querySelector("#confirm");
  dialog.querySelector("h2").textContent = `Stop ${name}?`;
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "stop"), { once: true });
  });
}

async function stop(form) {
  if (!(await confirmed(form.dataset.name))) return;
  const button = form.querySelector("button");
  button.disabled = true;
  complain("");
  show(form.closest("li"), { name: form.dataset.name, label: "Stopping", state: "stopping", running: true });
  try {
    const answer = await fetch(form.action, {
      method: "POST",
      headers: { accept: "application/json", "x-csrf-token": csrf },
      body: new URLSearchParams(new FormData(form)),
    });
    if (!answer.ok) {
      const { error } = await answer.json();
      complain(`${form.dataset.name}: ${error.message} (reference ${error.id})`);
    }
  } catch {
    complain(`${form.dataset.name} may not be stopped: the server does not answer.`);
  }
  button.disabled = false;
  refresh();
}

for (const form of document.querySelectorAll("form.stop")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    stop(form);
  });
}
document.addEventListener("visibilitychange", refresh);
window.addEventListener("pageshow", (event) => event.persisted && refresh());
timer = setTimeout(refresh, EVERY_MS);
