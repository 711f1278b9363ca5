// The page of the server: a client of its routes, without a library. Text of models and users becomes text nodes alone.
"use strict";

const COMPARED = [1, 4, 16];
const RECORDED_RATE = 16000;
const LARGEST_SIDE = 2048;
const LARGEST_IMAGE = 4 * 2 ** 20;
const KINDS = { text: "text", image: "an image", audio: "sound" };
const READ_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const AUDIO_FORMATS = {
  "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/vnd.wave": "wav",
  "audio/mpeg": "mp3", "audio/flac": "flac", "audio/x-flac": "flac", "audio/ogg": "ogg",
};

const state = {
  models: [],
  messages: [], // {role: "user", text, media} and {role: "assistant", reply}, each with the element that shows it
  media: [], // attached to the message that is being written
  running: new Map(), // replies that are being written, each with what aborts it
  columns: [], // those that stand side by side
  recorder: null,
  isGone: false,
  follows: false, // whether the end of the conversation is to stay in sight
};

const $ = (id) => document.getElementById(id);

/** An element with properties, and with children that are elements or text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const button = (text, does, properties = {}) => make("button", { type: "button", onclick: does, ...properties }, text);

/** Says something to those who listen to the page. */
function say(text) {
  $("status").textContent = text;
}

const counted = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

// -------------------------------------------------------------------------------------------------------------- server

/** A request that the server has refused, with its status and what it says. */
class Refused extends Error {
  constructor(status, message) {
    super(`The server refused this (status ${status}): ${message}`);
  }
}

let keyAsked = null;

/** The response to a request; asks for a key, as often as it is needed. Refused: the server says no. */
async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer.");
    });
    if (response.ok) return response;
    const said = await response.json().then((content) => content.error.message, () => response.statusText);
    if (response.status !== 401) throw new Refused(response.status, said);
    if (sessionStorage.getItem("key") !== key) continue; // another request has got one since
    keyAsked ??= askForKey(key !== null).finally(() => (keyAsked = null));
    if (!(await keyAsked)) throw new Refused(401, said);
  }
}

/** Whether the user has given a key. */
function askForKey(isWrong) {
  const dialog = $("key-dialog");
  $("key-reason").textContent = isWrong
    ? "The server did not accept this key. Give another one."
    : "The server answers those who have a key.";
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      if (dialog.returnValue) sessionStorage.setItem("key", dialog.returnValue);
      resolve(Boolean(dialog.returnValue));
    };
  });
}

/** The events of a stream. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The reply ended before it was complete.");
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Has a reply written, and tells of each change. What fails is kept in the reply. */
async function write(reply, path, body, changed) {
  const control = new AbortController();
  state.running.set(reply, control);
  showRunning();
  const begun = performance.now();
  try {
    const headers = { "content-type": "application/json" };
    const content = JSON.stringify(body);
    const response = await request(path, { method: "POST", headers, body: content, signal: control.signal });
    for await (const part of eventsOf(response)) {
      take(reply, part);
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") reply.finish = "stopped";
    else reply.error = error.message;
  }
  reply.seconds = (performance.now() - begun) / 1000;
  reply.isComplete = true;
  state.running.delete(reply);
  changed();
  showRunning();
}

/** Adds what an event has to a reply. An image replaces the one before, which was not complete. */
function take(reply, part) {
  if (part.error) throw new Error(`The server failed: ${part.error.message}`);
  if (part.usage) reply.usage = part.usage;
  for (const choice of part.choices ?? []) {
    const said = choice.delta ?? { content: choice.text };
    reply.text += said.content ?? "";
    reply.tokens.push(...(choice.tokens ?? []));
    reply.steps.push(...(choice.exit_steps ?? []));
    for (const image of said.images ?? []) {
      const { url } = image.image_url;
      if (url.startsWith("data:image/")) reply.media = [{ type: "image", url, isPartial: image.partial }];
    }
    if (said.audio?.data) reply.media = [audioItem(said.audio.data, "wav", "sound.wav")];
    reply.finish = choice.finish_reason ?? reply.finish;
  }
}

function audioItem(data, format, name) {
  return { type: "audio", data, format, name, url: `data:audio/${format === "mp3" ? "mpeg" : format};base64,${data}` };
}

function emptyReply(it, kind) {
  const content = { text: "", tokens: [], steps: [], media: [], usage: null };
  return { model: it.id, kind, ...content, finish: null, error: null, isComplete: false, seconds: 0 };
}

/** Looks every few seconds whether the server answers, and says when it does not, and when it does again. */
async function watch() {
  let problem = null;
  try {
    const response = await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!response.ok) problem = "None of the server’s workers is ready. This page goes on as soon as one is.";
  } catch {
    problem = "The server does not answer. This page goes on as soon as it does.";
  }
  if (problem !== null && $("banner").textContent !== problem) $("banner").textContent = problem;
  $("banner").hidden = problem === null;
  if (problem === null && state.isGone) {
    $("banner").textContent = "";
    say("The server answers again.");
  }
  state.isGone = problem !== null;
  if (!state.isGone && !state.models.length) await loadModels();
  setTimeout(watch, state.isGone ? 1500 : 5000);
}

// -------------------------------------------------------------------------------------------------------------- models

async function loadModels() {
  try {
    state.models = (await (await request("/v1/models")).json()).data;
  } catch (error) {
    $("facts").replaceChildren(`${error.message} `, button("Ask again", loadModels));
    return;
  }
  $("model").replaceChildren(...state.models.map((model) => make("option", { value: model.id }, model.id)));
  showModel();
}

const model = () => state.models.find((it) => it.id === $("model").value);

const word = (kind) => (kind === "audio" ? "sound" : kind);

const listed = (kinds) => kinds.map(word).join(", ").replace(/, ([^,]*)$/, " and $1");

/** 35,744 as "35.7 thousand". */
function rounded(count) {
  for (const [size, name] of [[1e9, "billion"], [1e6, "million"], [1e3, "thousand"]]) {
    if (count >= size) return `${(count / size).toPrecision(3)} ${name}`;
  }
  return String(count);
}

/** Shows what the chosen model is, and offers what it can do. */
function showModel() {
  const it = model();
  const depth = () => `${counted(it.num_steps, "core step")} a token by default, at most ${it.max_steps}`;
  const facts = [
    `${rounded(it.num_parameters)} parameters`,
    `reads ${listed(it.reads)}`,
    `writes ${listed(it.writes)}`,
    it.has_chat ? "has conversations" : "has seen no conversations: your text goes on",
    it.num_steps === null ? "has no core that is repeated" : depth(),
    `room for ${counted(it.max_model_len, "token")}`,
  ];
  $("facts").replaceChildren(make("strong", {}, it.id), facts.join(" · "));
  $("depth").hidden = $("legend").hidden = it.num_steps === null;
  if (it.num_steps !== null) {
    $("steps").max = it.max_steps;
    $("steps").value = Math.min(it.num_steps, it.max_steps);
    showSteps();
    const named = Object.keys(it.exit_criteria).map((name) => [name, name.replaceAll("_", " ")]);
    const choices = [["", "the model’s own"], ["none", "none: all steps"], ...named];
    $("criterion").replaceChildren(...choices.map(([value, text]) => make("option", { value }, text)));
    showCriterion();
    showScale(it.max_steps);
  }
  const most = Math.max(1, Math.min(it.max_new_tokens, Math.floor(it.max_model_len / 2)));
  $("max-tokens").max = it.max_new_tokens;
  $("max-tokens").value = most;
  $("system-field").hidden = !it.has_chat;
  $("kind").replaceChildren(...it.writes.map((kind) => make("option", { value: kind }, KINDS[kind])));
  $("kind-field").hidden = !it.has_chat || it.writes.length < 2;
  const reads = (kind) => it.has_chat && it.reads.includes(kind);
  $("add-image").hidden = !reads("image");
  $("add-audio").hidden = $("record").hidden = !reads("audio");
  state.media = state.media.filter((item) => reads(item.type));
  showMedia();
  $("prompt-label").textContent = $("prompt").placeholder = it.has_chat ? "Message" : "Text that goes on";
  $("send").textContent = it.has_chat ? "Send" : "Go on";
  makeColumns(it);
}

function showSteps() {
  $("steps-shown").textContent = $("steps").value;
  $("steps").setAttribute("aria-valuetext", counted(Number($("steps").value), "step"));
}

function showCriterion() {
  const usual = model().exit_criteria[$("criterion").value];
  $("threshold-field").hidden = usual === undefined;
  $("threshold").value = "";
  $("threshold-help").textContent = `Empty: ${usual}.`;
}

// ------------------------------------------------------------------------------------------------------------- colours

/** The place of a number of steps on the scale of colours, from 0 to 1: as far from 1 to 2 as from 8 to 16. */
function place(steps) {
  const most = model()?.max_steps ?? 1;
  return most > 1 ? Math.min(1, Math.log2(Math.max(1, steps)) / Math.log2(most)) : 0;
}

function colour(element, steps) {
  element.style.setProperty("--place", place(steps).toFixed(3));
}

/** The legend: each number of steps, or, if they are many, the powers of two and the most. */
function showScale(most) {
  const numbers = Array.from({ length: most }, (_, index) => index + 1);
  const shown = most <= 10 ? numbers : numbers.filter((number) => number === most || (number & (number - 1)) === 0);
  $("legend").querySelector("ol").replaceChildren(...shown.map((number) => {
    const swatch = make("li", { className: "swatch" }, String(number));
    colour(swatch, number);
    return swatch;
  }));
}

// ------------------------------------------------------------------------------------------------------------- replies

/** What shows a reply, and follows it while it is written. */
class ReplyView {
  constructor(reply) {
    this.reply = reply;
    this.spans = [];
    this.numWhole = 0; // tokens whose text is there as a whole
    this.start = 0; // where the text of the next one begins
    const isText = reply.kind === "text";
    const parts = isText ? "Text of the reply, by tokens" : "Steps of each position of the reply";
    const what = `${parts}. Arrows go from one to the next.`;
    this.tokens = make("div", { className: isText ? "tokens" : "tokens positions", role: "group", "aria-label": what });
    this.media = make("div", { className: "media" });
    this.summary = make("p", { className: "summary" });
    this.error = make("p", { className: "problem", hidden: true });
    this.element = make("div", { className: "reply" }, this.media, this.tokens, this.error, this.summary);
    this.update();
  }

  update() {
    const { reply } = this;
    this.element.ariaBusy = String(!reply.isComplete);
    if (reply.steps.length) this.showTokens();
    else this.tokens.textContent = reply.text;
    this.tokens.hidden = !reply.text && !reply.steps.length;
    if (this.shown !== reply.media) this.showMedia();
    this.error.textContent = reply.error ?? "";
    this.error.hidden = reply.error === null;
    this.summary.textContent = summaryOf(reply);
  }

  /**
   * Tokens as spans. A stop string may have cut the text, and what may be the beginning of one comes later. The
   * positions of an image and of sound have steps, and no text.
   */
  showTokens() {
    const { tokens, steps, text } = this.reply;
    for (let index = this.numWhole; index < steps.length; index++) {
      const span = (this.spans[index] ??= this.makeToken(index, steps[index]));
      const end = this.start + (tokens[index]?.length ?? 0);
      const content = text.slice(this.start, end);
      span.textContent = content;
      span.classList.toggle("line", content.startsWith("\n"));
      span.classList.toggle("silent", !/[^\p{C}]|\n/u.test(content)); // nothing that is seen
      if (end > text.length) break;
      this.start = end;
      this.numWhole = index + 1;
    }
  }

  makeToken(index, steps) {
    const span = make("span", { className: "token", tabIndex: index ? -1 : 0 });
    span.dataset.steps = steps;
    colour(span, steps);
    this.tokens.append(span);
    return span;
  }

  showMedia() {
    this.shown = this.reply.media;
    const old = this.media.querySelector("img");
    for (const item of this.shown) {
      if (item.type === "image" && old) {
        old.src = item.url; // drawn further, in its place
        old.alt = altOf(item);
      } else this.media.replaceChildren(shownItem(item, altOf(item)));
    }
    for (const item of this.shown.filter((it) => !it.isPartial)) {
      const name = item.type === "image" ? "image.png" : "sound.wav";
      this.media.append(make("a", { href: item.url, download: name, className: "quiet" }, "Save"));
    }
  }
}

function altOf(item) {
  if (item.type === "audio") return "Sound of the reply";
  return item.isPartial ? "Image of the reply, not complete" : "Image of the reply";
}

/** An image or a player. */
function shownItem(item, name) {
  if (item.type === "audio") return make("audio", { controls: true, src: item.url, "aria-label": name });
  const image = make("img", { alt: name });
  image.onload = () => image.classList.toggle("small", image.naturalWidth <= 128);
  image.src = item.url;
  return image;
}

function summaryOf(reply) {
  const parts = [];
  if (!reply.isComplete) parts.push(reply.kind === "image" ? "Drawing …" : "Writing …");
  const tokens = reply.usage?.completion_tokens || reply.steps.length;
  const steps = reply.usage?.core_steps || reply.steps.reduce((sum, it) => sum + it, 0);
  if (tokens) parts.push(counted(tokens, reply.kind === "text" ? "token" : "position"));
  if (tokens && steps) parts.push(counted(steps, "core step"), `mean ${(steps / tokens).toFixed(1)}`);
  if (reply.isComplete && !reply.error) parts.push(`${reply.seconds.toFixed(1)} s`);
  if (reply.finish === "length") parts.push("cut: it has the most tokens");
  if (reply.finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** What is said of a reply that is complete. */
function spoken(reply) {
  if (reply.error) return reply.error;
  const what = reply.media.length ? `Reply with ${KINDS[reply.media[0].type]}.` : `Reply: ${reply.text}.`;
  return `${what} ${summaryOf(reply)}`;
}

const visible = (text) => (text.length ? text.replaceAll("\n", "↵").replaceAll(" ", "␣") : "no text");

/** The number of steps of a token, beside it. */
function showTip(token) {
  const tip = $("tip");
  const number = [...token.parentElement.children].indexOf(token) + 1;
  const isPosition = token.parentElement.classList.contains("positions");
  const what = isPosition ? `position ${number}` : visible(token.textContent);
  tip.replaceChildren(make("b", {}, counted(Number(token.dataset.steps), "step")), ` ${what}`);
  tip.hidden = false;
  token.setAttribute("aria-describedby", "tip");
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above < 8 ? box.bottom + 6 : above}px`;
}

function hideTip() {
  $("tip").hidden = true;
  document.querySelector('[aria-describedby="tip"]')?.removeAttribute("aria-describedby");
}

/** Moves the focus from token to token. */
function moveAmongTokens(event) {
  const token = event.target.closest?.(".token");
  if (!token || event.altKey || event.ctrlKey || event.metaKey) return;
  const all = [...token.parentElement.children];
  const here = all.indexOf(token);
  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -all.length, End: all.length };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const next = all[Math.max(0, Math.min(all.length - 1, here + moves[event.key]))];
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// ------------------------------------------------------------------------------------------------------------ requests

/** The number in a field, or null if it is empty. */
const numberIn = (id) => ($(id).value === "" ? null : Number($(id).value));

/** The path and body of a request for a reply. */
function requestFor(it, messages, kind, steps, seed) {
  const body = { model: it.id, exit_steps: true, stream: true, stream_options: { include_usage: true } };
  if (seed !== null) body.seed = seed;
  if (it.num_steps !== null) {
    body.num_steps = steps;
    if ($("criterion").value) body.exit_criterion = $("criterion").value;
    if (body.exit_criterion && numberIn("threshold") !== null) body.exit_threshold = numberIn("threshold");
  }
  if (kind === "text") {
    body.temperature = numberIn("temperature");
    body.top_p = numberIn("top-p");
    body.max_tokens = numberIn("max-tokens");
  } else body.modalities = [kind];
  if (it.has_chat) return ["/v1/chat/completions", { ...body, messages: conversation(messages, it) }];
  const prompt = messages.map((message) => message.text ?? message.reply.text).join("");
  return ["/v1/completions", { ...body, prompt }];
}

/** Messages as the server takes them: without questions that have no answer, and media that the model cannot read. */
function conversation(messages, it) {
  const system = $("system").value.trim();
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const [question, answer] of turnsOf(messages)) {
    const contents = [question, answer].map((message) => message && contentOf(message, it));
    if (answer && !contents[1].length) continue;
    sent.push({ role: "user", content: contents[0] });
    if (answer) sent.push({ role: "assistant", content: contents[1] });
  }
  return sent;
}

/** Questions with their answers, and the last question, which has none. */
function turnsOf(messages) {
  const turns = [];
  messages.forEach((message, index) => {
    if (message.role !== "user") return;
    const answer = messages[index + 1];
    if (!answer || isGood(answer)) turns.push([message, answer]);
  });
  return turns;
}

/** Whether a reply is something that may be answered and learned. */
function isGood({ reply }) {
  return !reply.error && (reply.text !== "" || reply.media.some((item) => !item.isPartial));
}

function contentOf(message, it) {
  const { text, media } = message.reply ?? message;
  const parts = media.filter((item) => !message.reply || it.reads.includes(item.type)).map(partOf);
  if (!parts.length) return text;
  return text ? [...parts, { type: "text", text }] : parts;
}

function partOf(item) {
  if (item.type === "image") return { type: "image_url", image_url: { url: item.url } };
  return { type: "input_audio", input_audio: { data: item.data, format: item.format } };
}

// -------------------------------------------------------------------------------------------------------- conversation

/** Whether the options are valid; shows the first that is not. */
function optionsAreValid() {
  if ($("options").checkValidity()) return true;
  openSettings(true);
  $("options").reportValidity();
  return false;
}

/** Sends what has been written, to the conversation or side by side. */
function send() {
  const it = model();
  const text = $("prompt").value;
  const isEmpty = !text.trim() && !state.media.length;
  if (!it || state.running.size || state.recorder || !optionsAreValid()) return;
  if (isEmpty && (it.has_chat || !state.messages.length || isComparing())) return;
  showProblem(null);
  const message = { role: "user", text, media: state.media };
  state.media = [];
  $("prompt").value = "";
  showMedia();
  if (isComparing()) compare(it, message);
  else {
    add(message);
    answer(it);
  }
}

/** Adds a message and what shows it. */
function add(message) {
  message.element = make("article", { className: `message ${message.role}` });
  state.messages.push(message);
  showMessage(message);
  $("log").append(message.element);
  showConversation();
}

/** Has the conversation answered. */
async function answer(it) {
  const kind = it.has_chat ? $("kind").value : "text";
  const [path, body] = requestFor(it, state.messages, kind, Number($("steps").value), numberIn("seed"));
  const message = { role: "assistant", reply: emptyReply(it, kind) };
  add(message);
  say(kind === "text" ? "The model writes." : "The model draws.");
  state.follows = true;
  scrollDown();
  await write(message.reply, path, body, () => message.view.update());
  if (state.messages.includes(message)) {
    say(spoken(message.reply));
    showConversation();
  }
}

const isAtEnd = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 120;
const scrollDown = () => window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });

function showMessage(message) {
  const isUser = message.role === "user";
  const tools = make("div", { className: "tools" });
  const name = isUser ? "You" : message.reply.model;
  const heading = make("h3", {}, name);
  if (isUser) {
    const media = make("div", { className: "media" }, ...message.media.map((item) => shownItem(item, item.name)));
    message.element.replaceChildren(heading, media, make("p", { className: "said" }, message.text), tools);
    tools.append(
      button("Copy", (event) => copy(message.text, event.currentTarget)),
      button("Edit", () => edit(message), { className: "while-idle" }),
    );
    return;
  }
  message.view = new ReplyView(message.reply);
  message.element.replaceChildren(heading, message.view.element, tools);
  if (message.reply.kind === "text") {
    tools.append(button("Copy", (event) => copy(message.reply.text, event.currentTarget)));
  }
  tools.append(button("Regenerate", () => regenerate(message), { className: "while-idle" }));
}

/** Removes a message and all that follow it. */
function removeFrom(message) {
  for (const removed of state.messages.splice(state.messages.indexOf(message))) removed.element.remove();
  showConversation();
}

function regenerate(message) {
  if (state.running.size || !optionsAreValid()) return;
  removeFrom(message);
  answer(model());
  $("stop").focus();
}

/** Lets a message be written anew; the conversation goes on from there. */
function edit(message) {
  const field = make("textarea", { value: message.text, rows: 2, "aria-label": "Edited message" });
  const back = () => {
    showMessage(message);
    showRunning();
    message.element.querySelectorAll("button")[1].focus();
  };
  const sendEdited = () => {
    if (state.running.size || (!field.value.trim() && !message.media.length) || !optionsAreValid()) return;
    removeFrom(message);
    add({ role: "user", text: field.value, media: message.media });
    answer(model());
    $("prompt").focus();
  };
  field.onkeydown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      back();
    } else if (isSending(event)) {
      event.preventDefault();
      sendEdited();
    }
  };
  const buttons = [button("Send", sendEdited, { className: "while-idle" }), button("Cancel", back)];
  const tools = make("div", { className: "tools" }, ...buttons);
  message.element.replaceChildren(message.element.firstChild, field, tools);
  field.focus();
}

function clear() {
  stop();
  if (isComparing()) return;
  if (state.messages.length) removeFrom(state.messages[0]);
  say("The conversation is empty.");
  $("prompt").focus();
}

function stop() {
  for (const control of state.running.values()) control.abort();
}

async function copy(text, from) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const field = make("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    from.focus();
  }
  const name = from.textContent;
  from.textContent = "Copied";
  say("Copied.");
  setTimeout(() => (from.textContent = name === "Copied" ? "Copy" : name), 1500);
}

function showConversation() {
  $("empty").hidden = state.messages.length > 0;
  $("clear").disabled = !state.messages.length;
  $("export").disabled = !state.messages.some((message) => message.reply?.isComplete && isGood(message));
}

function showRunning() {
  const isRunning = state.running.size > 0;
  const hadFocus = document.activeElement === $("stop");
  $("stop").hidden = !isRunning;
  $("send").hidden = isRunning;
  if (hadFocus && !isRunning) $("prompt").focus();
  for (const it of document.querySelectorAll(".while-idle")) it.disabled = isRunning;
}

const isSending = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function showProblem(text) {
  $("problem").textContent = text ?? "";
  $("problem").hidden = text === null;
}

// -------------------------------------------------------------------------------------------------------- side by side

const isComparing = () => document.querySelector('input[name="mode"]:checked').value === "compare";

function showMode() {
  $("chat").hidden = isComparing();
  $("compare").hidden = !isComparing();
  $("steps-field").hidden = isComparing();
}

/** Empty columns for the steps that are compared. */
function makeColumns(it) {
  const most = it.max_steps ?? 1;
  state.columns = COMPARED.map((steps, index) => {
    const range = { type: "number", min: 1, max: most, step: 1, value: Math.min(steps, most), required: true };
    const field = make("input", { ...range, id: `column-${index}` });
    const label = make("label", { htmlFor: field.id }, "Steps");
    const body = make("div", {}, make("p", { className: "help" }, "The reply will be here."));
    const head = make("div", { className: "run-head" }, label, field);
    const element = make("article", { className: "run", "aria-label": `Column ${index + 1}` }, head, body);
    return { field, body, element };
  });
  $("runs").replaceChildren(...state.columns.map((column) => column.element));
  $("asked").hidden = true;
  $("compare-seed").textContent = "";
}

/** The same prompt at each number of steps, with the same draws. */
async function compare(it, message) {
  const wrong = state.columns.find((column) => !column.field.reportValidity());
  if (wrong) {
    $("prompt").value = message.text;
    state.media = message.media;
    showMedia();
    return;
  }
  const kind = it.has_chat ? $("kind").value : "text";
  const seed = numberIn("seed") ?? Math.floor(Math.random() * 2 ** 31);
  $("compare-seed").textContent = `All columns have seed ${seed}.`;
  const media = message.media.map((item) => shownItem(item, item.name));
  $("asked").replaceChildren(...media, make("p", { className: "said" }, message.text));
  $("asked").hidden = false;
  say("The model writes three replies.");
  const replies = await Promise.all(state.columns.map(async (column) => {
    const [path, body] = requestFor(it, [message], kind, Number(column.field.value), seed);
    const reply = emptyReply(it, kind);
    const view = new ReplyView(reply);
    column.body.replaceChildren(view.element);
    await write(reply, path, body, () => view.update());
    return reply;
  }));
  say(replies.map((reply, index) => `Column ${index + 1}. ${spoken(reply)}`).join(" "));
}

// --------------------------------------------------------------------------------------------------------------- media

/** Attaches files that the model reads. */
async function attach(files) {
  const it = model();
  for (const file of files) {
    const type = file.type.split("/")[0];
    if (!it?.has_chat || !["image", "audio"].includes(type) || !it.reads.includes(type)) {
      showProblem(`${file.name} cannot be attached: this model reads ${it ? listed(it.reads) : "nothing yet"}.`);
      continue;
    }
    try {
      keep(type === "image" ? await imageOf(file) : await audioOf(file));
    } catch {
      showProblem(`${file.name} cannot be read as ${type === "image" ? "an image" : "sound"}.`);
    }
  }
}

function keep(item) {
  const most = model().max_media;
  if (state.media.length >= most) {
    showProblem(`The server takes at most ${most} images and sounds.`);
    return;
  }
  showProblem(null);
  state.media.push(item);
  showMedia();
  say(`${item.name} is attached.`);
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** An image as it is, or smaller and as PNG if it is large or of a format that servers do not read. */
async function imageOf(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  let blob = file;
  if (!READ_AS_THEY_ARE.includes(file.type) || (scale < 1 && file.size > LARGEST_IMAGE)) {
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = make("canvas", { width, height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
  return { type: "image", name: file.name || "image", url: await dataUri(blob) };
}

/** A sound as it is, or as WAV if it is of a format that servers do not read. */
async function audioOf(file, name = file.name) {
  const format = AUDIO_FORMATS[file.type.split(";")[0]];
  const blob = format ? file : await wavOf(file);
  return audioItem((await dataUri(blob)).split(",")[1], format ?? "wav", name);
}

/** Sound of any format that the browser reads as WAV, one channel of 16 bits. */
async function wavOf(blob) {
  const context = new OfflineAudioContext(1, 1, RECORDED_RATE); // it decodes at its own rate
  const sound = await context.decodeAudioData(await blob.arrayBuffer());
  const channels = Array.from({ length: sound.numberOfChannels }, (_, index) => sound.getChannelData(index));
  const view = new DataView(new ArrayBuffer(44 + 2 * sound.length));
  const write = (at, text) => [...text].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * sound.length, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, RECORDED_RATE, true);
  view.setUint32(28, 2 * RECORDED_RATE, true);
  view.setUint16(32, 2, true); // bytes of a sample
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * sound.length, true);
  for (let index = 0; index < sound.length; index++) {
    const value = channels.reduce((sum, channel) => sum + channel[index], 0) / channels.length;
    view.setInt16(44 + 2 * index, Math.round(Math.max(-1, Math.min(1, value)) * 32767), true);
  }
  return new Blob([view.buffer], { type: "audio/wav" });
}

/** Begins to record, or ends it and attaches what was recorded. */
async function record() {
  if (state.recorder) {
    state.recorder.stop();
    return;
  }
  if (!navigator.mediaDevices) {
    showProblem("A browser records only for pages of this machine, or those that come by https.");
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    showProblem(`There is no recording: ${error.message}`);
    return;
  }
  const recorder = (state.recorder = new MediaRecorder(stream));
  const parts = [];
  const begun = performance.now();
  const most = model().max_audio_seconds;
  const clock = setInterval(() => {
    const seconds = Math.floor((performance.now() - begun) / 1000);
    $("record").textContent = `Stop recording ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    if (seconds >= most - 1) recorder.stop();
  }, 200);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = async () => {
    clearInterval(clock);
    stream.getTracks().forEach((track) => track.stop());
    state.recorder = null;
    $("record").textContent = "Record";
    $("record").classList.remove("recording");
    try {
      keep(await audioOf(new Blob(parts), "recording.wav")); // of no type, so that it becomes WAV
    } catch {
      showProblem("The recording cannot be read; it may be too short.");
    }
  };
  recorder.start();
  $("record").classList.add("recording");
  say("Recording.");
}

/** The attachments, each of which can be removed. */
function showMedia() {
  $("attachments").hidden = !state.media.length;
  $("attachments").replaceChildren(...state.media.map((item) => {
    const remove = button("Remove", () => {
      state.media = state.media.filter((other) => other !== item);
      showMedia();
      say(`${item.name} is removed.`);
      $("prompt").focus();
    }, { "aria-label": `Remove ${item.name}` });
    return make("li", {}, shownItem(item, item.name), make("span", { className: "name" }, item.name), remove);
  }));
}

// -------------------------------------------------------------------------------------------------------------- export

/** Saves the conversation as a line of JSON, as fine-tuning reads it; with media, as a zip of the line and files. */
async function exportConversation() {
  const files = [];
  const kept = [];
  for (const [question, answered] of turnsOf(state.messages)) {
    if (!answered || !answered.reply.isComplete) continue;
    for (const message of [question, answered]) {
      const { text, media } = message.reply ?? message;
      const parts = [];
      for (const item of media) {
        const bytes = new Uint8Array(await (await blobOf(item.url)).arrayBuffer());
        const name = `media/${files.length + 1}.${item.format ?? item.url.slice(11).split(/[;+]/)[0]}`;
        files.push({ name, bytes });
        parts.push({ type: item.type, path: name });
      }
      if (text) parts.push({ type: "text", text });
      kept.push({ role: message.role, content: media.length ? parts : text });
    }
  }
  const system = $("system").value.trim();
  const hasChat = model().has_chat;
  if (hasChat && system) kept.unshift({ role: "system", content: system });
  const row = hasChat ? { messages: kept } : { text: kept.map((message) => message.content).join("") };
  const line = new TextEncoder().encode(`${JSON.stringify(row)}\n`);
  if (files.length) save(zipOf([{ name: "conversation.jsonl", bytes: line }, ...files]), "conversation.zip");
  else save(new Blob([line], { type: "application/jsonl" }), "conversation.jsonl");
}

/** The content of a data: URI, which a page with this policy may not fetch. */
function blobOf(uri) {
  const [head, data] = uri.split(",");
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${name} is saved.`);
}

function checksum(bytes) {
  let value = -1;
  for (const byte of bytes) {
    value ^= byte;
    for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  }
  return ~value >>> 0;
}

/** A zip of files as they are, without compression. */
function zipOf(files) {
  const parts = [];
  const index = [];
  let offset = 0;
  for (const { name, bytes } of files) {
    const path = new TextEncoder().encode(name);
    const facts = [20, 0, 0, 0, 0x21]; // version, flags, stored, and the first day that zips know
    const sizes = [checksum(bytes), bytes.length, bytes.length];
    const head = zipRecord(0x04034b50, facts, sizes, [path.length, 0]);
    index.push(zipRecord(0x02014b50, [20, ...facts], sizes, [path.length, 0, 0, 0, 0, 0, 0], [offset]), path);
    parts.push(head, path, bytes);
    offset += head.length + path.length + bytes.length;
  }
  const length = index.reduce((sum, part) => sum + part.length, 0);
  const end = zipRecord(0x06054b50, [0, 0, files.length, files.length], [length, offset], [0]);
  return new Blob([...parts, ...index, end], { type: "application/zip" });
}

/** A record of a zip: its mark, then numbers of 16 and of 32 bits in turn. */
function zipRecord(mark, ...groups) {
  const sizes = groups.map((group, index) => group.map((value) => [value, index % 2 ? 4 : 2])).flat();
  const view = new DataView(new ArrayBuffer(4 + sizes.reduce((sum, [, size]) => sum + size, 0)));
  view.setUint32(0, mark, true);
  let at = 4;
  for (const [value, size] of sizes) {
    if (size === 4) view.setUint32(at, value, true);
    else view.setUint16(at, value, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

// -------------------------------------------------------------------------------------------------------------- events

function openSettings(isOpen) {
  $("settings").classList.toggle("open", isOpen);
  $("show-settings").setAttribute("aria-expanded", String(isOpen));
}

function listen() {
  $("model").onchange = showModel;
  $("steps").oninput = showSteps;
  $("criterion").onchange = showCriterion;
  $("numbers").onchange = () => document.body.classList.toggle("numbers", $("numbers").checked);
  $("show-settings").onclick = () => openSettings(!$("settings").classList.contains("open"));
  $("options").onsubmit = (event) => event.preventDefault();
  document.querySelectorAll('input[name="mode"]').forEach((it) => (it.onchange = showMode));
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  $("prompt").onkeydown = (event) => {
    if (!isSending(event)) return;
    event.preventDefault();
    send();
  };
  $("stop").onclick = stop;
  $("clear").onclick = clear;
  $("export").onclick = exportConversation;
  $("record").onclick = record;
  for (const kind of ["image", "audio"]) {
    $(`add-${kind}`).onclick = () => $(`${kind}-file`).click();
    $(`${kind}-file`).onchange = async (event) => {
      await attach([...event.target.files]);
      event.target.value = "";
    };
  }
  $("prompt").onpaste = (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    attach(files);
  };
  document.ondragover = (event) => {
    event.preventDefault();
    $("composer").classList.add("dropping");
  };
  document.ondragleave = () => $("composer").classList.remove("dropping");
  document.ondrop = (event) => {
    event.preventDefault();
    $("composer").classList.remove("dropping");
    attach([...event.dataTransfer.files]);
  };
  document.onkeydown = (event) => {
    if (event.key === "Escape" && !$("key-dialog").open) {
      hideTip();
      stop();
    } else moveAmongTokens(event);
  };
  for (const name of ["pointerover", "focusin"]) {
    document.addEventListener(name, (event) => {
      const token = event.target.closest?.(".token");
      hideTip();
      if (token) showTip(token);
    });
  }
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", () => {
    hideTip();
    state.follows = isAtEnd();
  }, { passive: true });
  new ResizeObserver(() => state.follows && scrollDown()).observe($("log"));
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    $("key-dialog").close($("key").value.trim());
  };
  $("key-cancel").onclick = () => $("key-dialog").close("");
}

listen();
showMode();
watch();
