// All text of people and models goes in by textContent or value, never as HTML.
const $ = id => document.getElementById(id), KEY = "jaxlm.chat/1";
const FIELDS = ["system", "temperature", "top_p", "top_k", "max_tokens", "seed", "model", "second"];
// turns: [{user: text, answers: [{model, text, pieces, error, sources}]}]; pieces, where
// probabilities are asked for: [{text, said: [{text, p, top}]}], whole characters and the tokens
// they are made of; sources, of a model with documents: [{document, heading, text}]
const state = {language: navigator.language.startsWith("ja") ? "ja" : "en", turns: [], fields: {}};
let models = [], running = null;
const views = new WeakMap(); // answer → where its text is

const t = word => WORDS[state.language][word];

function make(tag, text = "", cls = "") {
  const found = document.createElement(tag);
  found.textContent = text; found.className = cls;
  return found;
}

function save() {
  for (const id of FIELDS) state.fields[id] = $(id).value;
  try { localStorage.setItem(KEY, JSON.stringify(state)); } catch { /* private mode, or full */ }
}

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    if (kept.language in WORDS) state.language = kept.language;
    if (Array.isArray(kept.turns)) state.turns = kept.turns;
    Object.assign(state.fields, kept.fields);
  } catch { /* somebody else's */ }
  for (const id of FIELDS) if (state.fields[id] !== undefined) $(id).value = state.fields[id];
}

function say(word) { $("status").dataset.t = word; $("status").textContent = t(word); }

function tell(message) { delete $("status").dataset.t; $("status").textContent = message; }

function translate() {
  document.documentElement.lang = state.language;
  for (const e of document.querySelectorAll("[data-t]")) e.textContent = t(e.dataset.t);
  $("ask").placeholder = t("ask"); $("form").setAttribute("aria-label", t("ask"));
  $("language").textContent = t("language");
  $("language").lang = state.language === "ja" ? "en" : "ja";
  $("talk").setAttribute("aria-label", t("talk"));
  if ($("second").options.length) $("second").options[0].textContent = t("none");
  const uses = Object.keys(PRESETS).map(name => new Option(t(name), name)), now = $("preset").value;
  $("preset").replaceChildren(new Option(t("none"), ""), ...uses);
  $("preset").value = now;
  show();
}

function headers() {
  const token = $("token").value;
  return {"Content-Type": "application/json", ...(token && {Authorization: "Bearer " + token})};
}

async function list() {
  const answer = await fetch("/v1/models", {headers: headers()});
  const said = await answer.json();
  if (!answer.ok) { tell(said.error.message); $("settings").open = true; return; }
  models = said.data.map(m => m.id);
  for (const id of ["model", "second"]) {
    const options = models.map(name => new Option(name, name));
    $(id).replaceChildren(...(id === "second" ? [new Option(t("none"), "")] : []), ...options);
    if (models.includes(state.fields[id])) $(id).value = state.fields[id];
  }
  tell("");
}

function greet() { list().catch(error => tell(error.message)); }

// ------------------------------------------------------------------------------------ what is seen

function show() {
  $("tip").hidden = true; // what it is about goes
  $("heard").replaceChildren();
  $("talk").replaceChildren(...state.turns.map((turn, i) => {
    const box = make("div", "", "turn"), user = make("article", "", "user");
    user.setAttribute("aria-label", t("you"));
    user.append(make("h2", t("you")), make("div", turn.user, "text"));
    user.append(acts(["edit", () => edit(i)]));
    const pair = make("div", "", "pair");
    for (const answer of turn.answers) pair.append(shown(answer));
    if (turn.answers.length && i === state.turns.length - 1) {
      pair.lastChild.append(acts(["again", regenerate]));
    }
    box.append(user, pair);
    return box;
  }));
}

function acts(...pairs) {
  const row = make("div", "", "acts");
  for (const [word, act] of pairs) {
    const button = make("button", t(word));
    button.type = "button"; button.disabled = running !== null; button.onclick = act;
    row.append(button);
  }
  return row;
}

function shown(answer) {
  const box = make("article"), text = make("div", "", "text");
  box.setAttribute("aria-label", answer.model);
  box.append(make("h2", answer.model), text);
  if ($("shown").checked && answer.pieces.length) {
    text.setAttribute("role", "listbox"); text.setAttribute("aria-label", t("answer"));
    text.append(...answer.pieces.map(token));
    text.firstChild.tabIndex = 0; // one stop of the Tab key; arrows move within
  } else text.textContent = answer.text;
  for (const source of answer.sources ?? []) {
    const one = make("details", "", "source"), where = [source.document, source.heading];
    one.append(make("summary", where.filter(Boolean).join(" – ")), make("div", source.text));
    box.append(one);
  }
  if (answer.error) box.append(make("p", answer.error, "error"));
  views.set(answer, text);
  return box;
}

function token(piece) {
  const found = make("span", piece.text), p = piece.said.reduce((all, one) => all * one.p, 1);
  found.dataset.p = p > .5 ? 0 : p > .1 ? 1 : 2;
  found.tabIndex = -1; found.setAttribute("role", "option");
  if (!piece.text.trim()) found.setAttribute("aria-label", JSON.stringify(piece.text));
  const row = (mark, text, share) =>
    `${mark} ${JSON.stringify(text).replaceAll("\\\\", "\\")}  ${(100 * share).toFixed(1)} %`;
  const words = piece.said.map(one => [row("●", one.text, one.p),
    ...one.top.filter(([text]) => text !== one.text).map(([text, share]) => row("○", text, share)),
  ].join("\n")).join("\n\n");
  found.setAttribute("aria-description", words);
  found.onmouseenter = found.onfocus = () => tip(found, words);
  found.onmouseleave = found.onblur = () => { $("tip").hidden = true; };
  found.onkeydown = event => {
    const to = {ArrowRight: "nextSibling", ArrowLeft: "previousSibling"}[event.key];
    if (to && found[to]) { event.preventDefault(); found[to].focus(); }
    if (event.key === "Escape") $("tip").hidden = true;
  };
  return found;
}

function tip(at, words) {
  const box = $("tip"), where = at.getBoundingClientRect();
  box.textContent = words; box.hidden = false;
  const x = Math.min(where.left, innerWidth - box.offsetWidth - 8);
  const below = where.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = Math.max(8, x) + "px";
  box.style.top = (below ? where.bottom + 6 : Math.max(8, where.top - box.offsetHeight - 6)) + "px";
}

// ------------------------------------------------------------------------------------ conversation

function messages(upto, k) {
  const system = $("system").value.trim();
  const found = system ? [{role: "system", content: system}] : [];
  for (const turn of state.turns.slice(0, upto)) {
    found.push({role: "user", content: turn.user});
    const answer = turn.answers[Math.min(k, turn.answers.length - 1)];
    if (answer?.text) found.push({role: "assistant", content: answer.text});
  }
  return found.concat({role: "user", content: state.turns[upto].user});
}

function body(answer, k) {
  const number = id => $(id).value === "" ? null : Number($(id).value);
  const probabilities = $("shown").checked;
  return JSON.stringify({
    model: answer.model, messages: messages(state.turns.length - 1, k), stream: true,
    temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"),
    max_tokens: number("max_tokens"), seed: number("seed"), logprobs: probabilities,
    top_logprobs: probabilities ? 5 : null,
  });
}

async function ask(answer, k, signal) {
  const how = {method: "POST", headers: headers(), body: body(answer, k), signal};
  const reply = await fetch("/v1/chat/completions", how);
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "";;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") heard(answer, JSON.parse(part.slice(6)));
  }
}

function heard(answer, said) {
  if (said.error) throw new Error(said.error.message);
  if (said.sources) answer.sources = said.sources;
  const choice = said.choices[0], piece = choice?.delta.content ?? "";
  answer.text += piece;
  const tokens = (choice?.logprobs?.content ?? []).map(row => ({
    text: row.token, p: Math.exp(row.logprob),
    top: row.top_logprobs.map(other => [other.token, Math.exp(other.logprob)]),
  }));
  if (tokens.length) answer.pieces.push({text: piece, said: tokens});
  else if (answer.pieces.length) answer.pieces.at(-1).text += piece; // held back until the end
  const near = $("talk").parentNode, rest = near.scrollHeight - near.scrollTop;
  const low = rest - near.clientHeight < 80;
  views.get(answer).append(piece);
  if (low) end();
}

function end() { $("talk").parentNode.scrollTop = $("talk").parentNode.scrollHeight; }

async function answerLast() {
  const names = [$("model").value, $("second").value].filter(Boolean);
  const turn = state.turns.at(-1);
  turn.answers = names.map(model => ({model, text: "", pieces: [], error: ""}));
  running = new AbortController();
  $("send").hidden = true; $("stop").hidden = false; say("writing");
  show(); save(); end(); $("ask").focus();
  let word = "done";
  await Promise.all(turn.answers.map(async (answer, k) => {
    try { await ask(answer, k, running.signal); } catch (error) {
      answer.error = running.signal.aborted ? "" : error.message;
      word = running.signal.aborted ? "stopped" : "failed";
    }
  }));
  running = null;
  if (document.activeElement === $("stop")) $("ask").focus(); // it goes
  $("send").hidden = false; $("stop").hidden = true; say(word);
  show(); save();
  // Read out as a whole, by the screen reader; pieces as they come would break each word.
  $("heard").append(...turn.answers.map(a => make("p", `${a.model}: ${a.text} ${a.error}`)));
}

function send(event) {
  event.preventDefault();
  const text = $("ask").value.trim();
  if (!text || running || !$("model").value) return;
  state.turns.push({user: text, answers: []});
  $("ask").value = "";
  answerLast();
}

function edit(i) {
  $("ask").value = state.turns[i].user;
  state.turns.length = i;
  show(); save(); $("ask").focus();
}

function regenerate() { if (!running) answerLast(); }

$("form").onsubmit = send;
$("stop").onclick = () => { running?.abort(); $("ask").focus(); };
$("ask").onkeydown = event => {
  const composing = event.isComposing || event.keyCode === 229; // Japanese input takes its Enter
  if (event.key === "Enter" && !event.shiftKey && !composing) send(event);
};
$("new").onclick = () => { if (!running) { state.turns = []; show(); save(); $("ask").focus(); } };
$("language").onclick = () => {
  state.language = state.language === "ja" ? "en" : "ja";
  translate(); save();
};
$("preset").onchange = () => {
  const use = PRESETS[$("preset").value];
  $("system").value = use?.[state.language] ?? "";
  $("temperature").value = use?.temperature ?? 0.8;
  save();
};
$("shown").onchange = show;
$("token").onchange = greet;
for (const id of FIELDS) $(id).addEventListener("change", save);
load(); translate();
greet();
