// Drives a real browser through the portal and a display: signs in, opens a
// desktop, types into its terminal and reads the answer back, copies and pastes,
// resizes, comes back to the same terminal, is taken over by a telephone, stops
// the desktop, signs out.
//
// QVD, QVD_INIT and QVD_TEST_STORE name the command, the init and a state
// directory that holds the image; the server's log and screenshots of a failure
// go to QVD_TEST_OUTPUT.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { mkdir, open } from "node:fs/promises";
import { createInterface } from "node:readline";
import { promisify } from "node:util";

import { chromium } from "playwright-core";

const environment = (name) => process.env[name] ?? assert.fail(`${name} is not set`);
const [QVD, INIT, STORE] = ["QVD", "QVD_INIT", "QVD_TEST_STORE"].map(environment);
const OUTPUT = process.env.QVD_TEST_OUTPUT ?? "target/browser";
const CHROMIUM = process.env.QVD_TEST_CHROMIUM ?? "/usr/bin/chromium";
const FLAVOUR = "icewm";

// Deadlines, in milliseconds: generous, because they only bound a failure.
const STEP = 60_000;
const LOOK_AGAIN = 250;

const user = `browser-${randomBytes(3).toString("hex")}`;
const password = randomBytes(12).toString("base64url");
const qvd = async (...args) =>
  (await promisify(execFile)(QVD, ["--root", STORE, ...args], { timeout: STEP })).stdout;

/** Asks again until the answer satisfies, or fails with the last one. */
async function until(what, ask, satisfies) {
  const end = Date.now() + STEP;
  for (;;) {
    const answer = await ask();
    if (satisfies(answer)) return answer;
    if (Date.now() > end) assert.fail(`${what} did not happen within ${STEP} ms; last seen: ${answer}`);
    await new Promise((resume) => setTimeout(resume, LOOK_AGAIN));
  }
}

async function startServer() {
  const args = ["--root", STORE, "--json", "up", "--listen", "127.0.0.1:0", "--init", INIT, "--ephemeral"];
  await mkdir(OUTPUT, { recursive: true });
  const log = await open(`${OUTPUT}/qvd.log`, "w");
  const child = spawn(QVD, args, { stdio: ["ignore", "pipe", log.fd] });
  await log.close();
  const ended = new Promise((resolve) => child.once("exit", (code, signal) => resolve(code ?? signal)));
  const lines = createInterface({ input: child.stdout });
  const ready = new Promise((resolve) => lines.once("line", resolve));
  const line = await Promise.race([ready, ended.then((status) => assert.fail(`qvd up ended: ${status}`))]);
  return {
    url: JSON.parse(line).url,
    async stop() {
      child.kill("SIGTERM");
      assert.equal(await ended, 0, "qvd up ended badly");
    },
  };
}

async function addUser() {
  const child = spawn(QVD, ["--root", STORE, "user", "add", user, "--password-stdin"], {
    stdio: ["pipe", "inherit", "inherit"],
  });
  child.stdin.end(`${password}\n`);
  const status = await new Promise((resolve) => child.once("exit", resolve));
  assert.equal(status, 0, "the user could not be added");
}

const CANVAS = "#screen canvas";

/** How many colours the display shows, and a number that changes with it. */
const look = (page) =>
  page.evaluate((selector) => {
    const canvas = document.querySelector(selector);
    if (!canvas || canvas.width === 0) return { colours: 0, hash: 0, size: "0x0" };
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const pixels = new Uint32Array(data.buffer);
    let hash = 0;
    for (const pixel of pixels) hash = (Math.imul(hash, 31) + pixel) | 0;
    return { colours: new Set(pixels).size, hash, size: `${canvas.width}x${canvas.height}` };
  }, CANVAS);

const troubles = [];

async function newPage(context, name) {
  const page = await context.newPage();
  page.setDefaultTimeout(STEP);
  page.on("pageerror", (error) => troubles.push(`${name}: ${error}`));
  page.on("console", (message) => {
    if (/Content Security Policy/i.test(message.text())) troubles.push(`${name}: ${message.text()}`);
  });
  return page;
}

async function signIn(page, url, secret = password) {
  await page.goto(url);
  await page.fill("#user", user);
  await page.fill("#password", secret);
  await page.click('form[action="/sign-in"] button[type="submit"]');
}

/** Waits until the desktop is on the screen and takes what is typed. */
async function waitForScreen(page) {
  await page.waitForSelector("#overlay", { state: "hidden" });
  // A window manager with a terminal is never one flat colour.
  await until("a picture", () => look(page), ({ colours }) => colours > 8);
  await page.locator(CANVAS).focus();
}

const type = (page, text) => page.keyboard.type(`${text}\n`, { delay: 15 });

/** Types letters as a keyboard that has them does: each is one key, without Shift. */
async function typeLetters(page, text) {
  const devtools = await page.context().newCDPSession(page);
  for (const key of text) {
    for (const type of ["keyDown", "keyUp"]) await devtools.send("Input.dispatchKeyEvent", { type, key, code: "KeyE" });
  }
  await devtools.detach();
}

const inside = (id, ...command) => qvd("desktop", "exec", "-T", id, "--", ...command);
const file = (id, name) => inside(id, "sh", "-c", `cat ~/${name} 2>/dev/null || true`);
const written = (id, name, text) => until(`a file with ${text}`, () => file(id, name), (found) => found === text);

const browser = await chromium.launch({
  executablePath: CHROMIUM,
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});
const newContext = (device = { viewport: { width: 1280, height: 800 } }) =>
  browser.newContext({ ignoreHTTPSErrors: true, ...device });
const server = await startServer();
let shown = [];

async function step(name, run) {
  const start = Date.now();
  try {
    await run();
  } catch (error) {
    for (const [index, page] of shown.entries()) {
      await page.screenshot({ path: `${OUTPUT}/failure-${index}.png` }).catch(() => {});
    }
    console.error(`FAILED: ${name}; screenshots and the log are in ${OUTPUT}`);
    throw error;
  }
  console.log(`ok: ${name} (${Date.now() - start} ms)`);
}

try {
  await addUser();
  const id = String(JSON.parse(await qvd("--json", "desktop", "create", user, FLAVOUR)).id);
  const context = await newContext();
  let page = await newPage(context, "first");
  shown = [page];

  await step("a wrong password is refused in words", async () => {
    await signIn(page, server.url, `${password}x`);
    assert.match(await page.textContent("#problem"), /password/i);
  });

  await step("signing in shows the user's desktops", async () => {
    await signIn(page, server.url);
    await page.waitForSelector(`li[data-desktop="${id}"]`);
    assert.equal(await page.locator("li[data-desktop]").count(), 1);
  });

  await step("opening a stopped desktop starts it", async () => {
    await page.click(`li[data-desktop="${id}"] a[href="/desktops/${id}"]`);
    await waitForScreen(page);
    // The shell names its window when it prompts.
    const title = () => inside(id, "sh", "-c", "xdotool getactivewindow getwindowname 2>/dev/null || true");
    await until("a prompt", title, (text) => text.includes("@"));
  });

  await step("what is typed is computed and shown", async () => {
    const before = await look(page);
    await type(page, "echo $((6*7)) | tee ~/answer; echo $$ > ~/shell");
    await written(id, "answer", "42\n");
    await until("a change of the picture", () => look(page), ({ hash }) => hash !== before.hash);
  });

  await step("every letter arrives, with Shift or a key of its own", async () => {
    await type(page, "clear");
    await typeLetters(page, "echo 'jeté ñandú ¿Ü? ß € ~|{}(Łódź)");
    for (const key of ["Shift+Digit4", "Shift+Digit9", "Shift+KeyQ", "Shift+Backquote"]) await page.keyboard.press(key);
    await type(page, "' > ~/letters");
    await written(id, "letters", "jeté ñandú ¿Ü? ß € ~|{}(Łódź)$(Q~\n");
  });

  await step("the clipboard of the browser reaches the desktop", async () => {
    const text = "größer\n€ 5 – „Łódź“ 🙂";
    await page.click("#handle");
    await page.click('[data-panel="clipboard"]');
    await page.fill("#clipboard-text", text);
    await page.click("#clipboard-send");
    await page.click("#handle");
    await page.locator(CANVAS).focus();
    await until("the pasted text", async () => {
      await type(page, "clear; xclip -selection clipboard -t UTF8_STRING -o > ~/pasted");
      return file(id, "pasted");
    }, (pasted) => pasted === text);
  });

  await step("the clipboard of the desktop reaches the browser", async () => {
    // A terminal full of one word: a double click anywhere in it selects that.
    await type(page, "clear; yes is$((6*7))now | head -n 3000 | tr '\\n' ' '; echo done > ~/filled");
    await written(id, "filled", "done\n");
    const box = await page.locator(CANVAS).boundingBox();
    const clipboard = () => page.inputValue("#clipboard-text");
    const points = [[0.11, 0.2], [0.23, 0.3], [0.31, 0.4], [0.17, 0.15]];
    let turn = 0;
    const select = async () => {
      const [x, y] = points[turn++ % points.length];
      await page.mouse.dblclick(box.x + box.width * x, box.y + box.height * y);
      return clipboard();
    };
    await until("a selected word", select, (text) => text.includes("is42now"));
    await page.locator(CANVAS).focus();
    await type(page, "clear; printf 'jet\\303\\251 \\342\\202\\254 \\360\\237\\231\\202' | xclip -selection clipboard");
    await until("a copied text", clipboard, (text) => text === "jeté € 🙂");
  });

  await step("the screen follows the window", async () => {
    await page.setViewportSize({ width: 1024, height: 700 });
    const current = () => inside(id, "xrandr", "--current");
    await until("the resize", current, (text) => /current 1024 x 700\b/.test(text));
    await until("the resized picture", () => look(page), ({ size }) => size === "1024x700");
  });

  await step("closing the tab and coming back finds the same terminal", async () => {
    await page.close();
    page = await newPage(context, "returned");
    shown = [page];
    await page.goto(`${server.url}/desktops/${id}`);
    await waitForScreen(page);
    await type(page, "echo $$ > ~/shell-again");
    await written(id, "shell-again", await file(id, "shell"));
  });

  const phone = await newPage(await newContext({ viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true }), "phone");

  await step("a second browser, a telephone, takes over and the first is told", async () => {
    shown.push(phone);
    await signIn(phone, `${server.url}/desktops/${id}`);
    await waitForScreen(phone);
    await page.waitForSelector("#overlay", { state: "visible" });
    assert.match(await page.textContent("#headline"), /another screen/);
  });

  await step("an on-screen keyboard types into the same terminal", async () => {
    await phone.tap("#handle");
    await phone.tap("#touch-keyboard");
    await phone.keyboard.insertText("echo é $((6*7)) $$ > ~/phonx");
    await phone.keyboard.press("Backspace");
    await phone.keyboard.insertText("e\n");
    await written(id, "phone", `é 42 ${await file(id, "shell")}`);
  });

  await step("the portal stops the desktop and the telephone is told", async () => {
    await page.click("#leave");
    const card = page.locator(`li[data-desktop="${id}"]`);
    await card.locator(".stop button").click();
    await page.click('#confirm button[value="stop"]');
    await page.waitForSelector(`li[data-desktop="${id}"][data-state="stopped"]`);
    await phone.waitForSelector("#again", { state: "visible" });
    assert.match(await phone.textContent("#headline"), /stopped/);
  });

  await step("signing out leaves nothing to come back to", async () => {
    await page.click('form[action="/sign-out"] button');
    await page.waitForSelector("#password");
    await page.goto(`${server.url}/desktops/${id}`);
    await page.waitForSelector("#password");
  });

  await step("no page had an error", () => assert.deepEqual(troubles, []));
} finally {
  await browser.close();
  await qvd("user", "rm", user, "--with-desktops").catch((error) => console.error(String(error)));
  await server.stop();
}
console.log("passed: browser test");
