// Run by test_page.py: the page in headless Chromium, as a person uses it.
//   node page_in_chromium.mjs MODULES URL TOKEN PICTURE SCREENSHOTS
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const [modules, url, token, picture, folder, sound] = process.argv.slice(2);
const require = createRequire(modules + "/");
const { chromium } = require("playwright-core");
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
    ...(sound ? ["--use-file-for-fake-audio-capture=" + sound] : [])],
});
const found = { faults: [], requests: [] };
const context = await browser.newContext({ viewport: { width: 1000, height: 720 },
  permissions: ["microphone"], bypassCSP: false });
const page = await context.newPage();
page.on("pageerror", (error) => found.faults.push(String(error)));
page.on("console", (line) => line.type() === "error" && found.faults.push(line.text()));
page.on("request", (request) => found.requests.push(request.url()));
const step = async (name, work) => {
  try { found[name] = await work(); } catch (error) { found[name] = "failed: " + error.message; }
};
const answered = async (n) => page.waitForFunction(
  (n) => document.querySelectorAll(".turn.assistant .end").length >= n, n, { timeout: 200000 });
const last = () => page.locator(".turn.assistant").last().innerText();

await page.goto(url, { waitUntil: "load" });
if (token !== "none") {
  await step("token", async () => {
    await page.waitForSelector("dialog[open]");
    await page.fill("#token", token);
    await page.keyboard.press("Enter");
  });
}
await page.waitForFunction(() => document.getElementById("model").textContent !== "edge-gemma");
found.model = await page.textContent("#model");
found.memory = await page.textContent("#memory");
await step("chat", async () => {
  await page.fill("#text", "Hello **there** <img src=x onerror=alert(1)>");
  await page.keyboard.press("Enter");
  await answered(1);
  found.asked = await page.locator(".turn.user").last().innerHTML();
  return last();
});
found.speed = await page.textContent("#speed");
found.sees = await page.isVisible("#picture");
found.hears = await page.isVisible("#talk");
const fresh = () => page.click("#new");  // random weights talk until the context is full
if (found.sees) {
  await step("picture", async () => {
    await fresh();
    await page.setInputFiles("#file", picture);
    await page.waitForSelector("#chosen img");
    await page.fill("#text", "What is this?");
    await page.click("#send");
    await answered(1);
    return last();
  });
}
if (found.hears) {
  await step("speech", async () => {
    await fresh();
    const before = found.requests.length;
    await page.focus("#talk");
    await page.keyboard.press("Space");
    await page.waitForTimeout(2500);
    found.pieces = found.requests.slice(before).filter((each) => each.endsWith("/audio")).length;
    await page.keyboard.press("Space");
    await answered(1);
    return last();
  });
}
await step("stopped", async () => {
  await fresh();
  await page.fill("#text", "Go on for long.");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#stop:visible");
  await page.keyboard.press("Escape");
  await answered(1);
  return page.locator(".turn.assistant .end").last().innerText();
});
await step("axe", async () => {
  await page.evaluate(readFileSync(require.resolve("axe-core/axe.min.js"), "utf8"));
  const result = await page.evaluate(() => axe.run());
  return result.violations.map((each) => each.id + ": " + each.nodes[0].html.slice(0, 120));
});
if (folder !== "none") {
  for (const [name, scheme, viewport] of [["light", "light", { width: 1000, height: 640 }],
    ["dark", "dark", { width: 1000, height: 640 }], ["phone", "light", { width: 390, height: 760 }]]) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize(viewport);
    await page.waitForTimeout(200);
    await page.screenshot({ path: `${folder}/page-${name}.png` });
  }
}
found.overflow = await page.evaluate(
  () => document.documentElement.scrollWidth > document.documentElement.clientWidth);
await browser.close();
console.log(JSON.stringify(found));
