"use strict";
// The page of `softprompt serve`. Names and answers are only ever inserted as text, never as HTML. The page's own texts
// are translated by `t` of zh.js.

const KEY = "softprompt.api_key"; // of sessionStorage: forgotten when the tab is closed
const $ = (id) => document.getElementById(id);

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// ---- The API ----

/** Return the response of a route; throw an Error whose message says what is wrong. */
async function call(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = sessionStorage.getItem(KEY);
  if (key) {
    headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(key)); // a header holds bytes
  }
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error(t("The server does not answer. Is it still running?"));
  });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `${t("The server answered with this status:")} ${response.status}`;
  if (response.status === 401) askForKey(key ? message : t("This server wants an API key."));
  throw new Error(message);
}

/** Yield the events of a streamed answer, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(t("The connection broke off."));
    });
    if (done) throw new Error(t("The answer ended too early."));
    const whole = (left + value).split("\n\n");
    left = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      yield parsed;
    }
  }
}

// ---- A panel: an adapter and what was said to it ----

class Panel {
  constructor() {
    const copy = $("panel").content.cloneNode(true);
    this.section = copy.querySelector("section");
    this.select = copy.querySelector("select");
    this.log = copy.querySelector(".log");
    this.messages = [];
    $("panels").append(copy);
  }

  /** Offer these models; keep the chosen one if it is still there. */
  offer(names, otherwise) {
    const chosen = this.select.value;
    this.select.replaceChildren(...names.map((name) => new Option(name, name)));
    this.select.value = names.includes(chosen) ? chosen : otherwise;
  }

  clear() {
    this.messages = [];
    this.log.replaceChildren();
  }

  /** Append an element to the conversation; scroll to its end unless the reader has scrolled up. */
  show(made, under = this.log) {
    this.keepingEnd(() => under.append(made));
    return made;
  }

  keepingEnd(change) {
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    change();
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  /** Show a question, and `answer`, which gets the element to write into; its errors are shown in words. */
  async ask(text, signal, answer) {
    this.show(element("div", "said question", text)).dir = "auto";
    this.log.scrollTop = this.log.scrollHeight;
    const said = this.show(element("div", "said answer"));
    this.show(element("span", "from", this.select.value), said);
    const words = this.show(element("span", "words waiting"), said);
    words.dir = "auto";
    try {
      const note = await answer(this.select.value, words);
      if (note) this.show(element("p", "note", note), said);
    } catch (error) {
      const stopped = error.name === "AbortError";
      this.show(element("p", stopped ? "note" : "error", stopped ? t("Stopped.") : error.message), said);
    } finally {
      words.classList.remove("waiting");
    }
  }

  chat(text, signal, settings) {
    return this.ask(text, signal, async (model, words) => {
      const history = this.messages; // that of before a click at New
      const question = { role: "user", content: text };
      const messages = [...($("remember").checked ? history : []), question];
      let reason = null;
      try {
        const response = await call("v1/chat/completions", { ...settings, model, messages, stream: true }, signal);
        for await (const { choices: [choice] } of events(response)) {
          reason = choice.finish_reason ?? reason;
          this.keepingEnd(() => words.append(choice.delta.content ?? "")); // a string is appended as text
        }
      } finally {
        if (words.textContent) history.push(question, { role: "assistant", content: words.textContent });
      }
      if (reason === "length") return t("Cut off: the limit of tokens was reached.");
      return words.textContent ? "" : t("The answer is empty.");
    });
  }

  choose(text, choices, signal) {
    return this.ask(text, signal, async (model, words) => {
      const got = await (await call("v1/classify", { model, input: text, choices }, signal)).json();
      const { label, choices: shares } = got.data[0];
      const bars = element("div", "bars");
      for (const { choice, probability } of shares) {
        const row = element("div", choice === label ? "choice best" : "choice");
        const track = element("div", "track");
        const bar = element("div", "bar");
        const percent = (100 * probability).toFixed(1);
        bar.style.width = `${percent}%`;
        track.append(bar);
        row.append(element("div", "name", choice), track, element("div", "share", `${percent} %`));
        bars.append(row);
      }
      this.show(bars, words.parentElement);
    });
  }
}

// ---- The page ----

const panels = [new Panel()];
let names = []; // of the base and its adapters
let running = null; // the AbortController of the answers that are being written

/** Fetch the names of the models. The first one is the base, which an adapter is preferred to. */
async function loadModels() {
  try {
    names = (await (await call("v1/models")).json()).data.map((model) => model.id);
    panels.forEach((panel, number) => panel.offer(names, names[number + 1] ?? names[0]));
  } catch (error) {
    if (!$("key-dialog").open) panels[0].show(element("p", "error", error.message));
  }
}

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function wantedChoices() {
  return $("choices").value.split("\n").map((line) => line.trim()).filter(Boolean);
}

function settings() {
  const given = ["temperature", "max_tokens"].filter((name) => $(name).value !== "");
  return Object.fromEntries(given.map((name) => [name, Number($(name).value)]));
}

async function send() {
  const text = $("text").value.trim();
  const choices = mode() === "choices" ? wantedChoices() : null;
  running = new AbortController();
  $("text").value = "";
  showRunning();
  const { signal } = running;
  const ask = (panel) => (choices ? panel.choose(text, choices, signal) : panel.chat(text, signal, settings()));
  await Promise.all(panels.map(ask));
  running = null;
  showRunning();
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

function askForKey(said) {
  $("key-said").textContent = said;
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

/** Let the browser say what is missing: blank texts count as none. */
function checkFields() {
  const few = mode() === "choices" && wantedChoices().length < 2;
  $("choices").setCustomValidity(few ? t("Write at least two choices, one per line.") : "");
  $("text").setCustomValidity($("text").value.trim() ? "" : t("Write a message."));
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) send();
});
$("send").addEventListener("click", checkFields);
$("settings").addEventListener("invalid", () => ($("settings").open = true), true);
$("stop").addEventListener("click", () => running?.abort());
$("text").addEventListener("keydown", (event) => {
  // An Enter that ends a composition (of Chinese, for example) does not send; Safari tells it by its code alone.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!running) $("send").click();
});
$("new").addEventListener("click", () => {
  running?.abort();
  panels.forEach((panel) => panel.clear());
  $("text").focus();
});
$("two").addEventListener("change", () => {
  if ($("two").checked) {
    panels.push(new Panel());
    panels[1].offer(names, names.slice(1).find((name) => name !== panels[0].select.value) ?? names[0]);
  } else {
    panels.pop().section.remove();
  }
});
document.querySelectorAll("input[name=mode]").forEach((input) =>
  input.addEventListener("change", () => ($("choices-row").hidden = mode() !== "choices")),
);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  $("key-dialog").close();
  loadModels();
});
document.addEventListener("visibilitychange", () => document.hidden || loadModels());
loadModels();
$("text").focus();
