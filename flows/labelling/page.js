// The page on which people label pairs of answers. Texts are shown as the HTML that the server has made of their
// Markdown (rendered_markdown.py), or as text.
"use strict";

const KEYS = {
  1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 3: "tie", t: "tie", 4: "both_bad", b: "both_bad", s: "skip",
};
const SEEN = 120; // milliseconds for which the chosen answer stays marked
const find = (id) => document.getElementById(id);
let rater = localStorage.getItem("rater") || "";
let pair = null; // that is shown
let shownAt = 0;
let isBusy = false;
let isSource = localStorage.getItem("view") === "source"; // whether texts are shown as they were written

async function call(path, content) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Alignflow": "label" },
    body: JSON.stringify({ rater, ...content }),
  });
  const found = await response.json();
  if (!response.ok) throw new Error(found.problem);
  return found;
}

// One request at a time: a key that is pressed meanwhile is for a pair that nobody has seen.
async function change(path, content, delay = 0) {
  if (isBusy) return;
  isBusy = true;
  try {
    if (delay) await new Promise((resolve) => setTimeout(resolve, delay));
    show(await call(path, content));
    find("problem").hidden = true;
  } catch (error) {
    for (const card of document.querySelectorAll("article")) card.classList.remove("chosen");
    const text = error instanceof TypeError ? "The server of this page does not answer: is `alignflow label` still running?" : error.message;
    find("problem").textContent = text;
    find("problem").hidden = false;
  } finally {
    isBusy = false;
  }
}

function show(state) {
  pair = state.pair;
  document.body.classList.remove("waits");
  find("who").hidden = true;
  find("round").textContent = state.round;
  find("done").textContent = state.done.toLocaleString("en");
  find("total").textContent = state.total.toLocaleString("en");
  find("bar").style.width = `${(100 * state.done) / Math.max(state.total, 1)}%`;
  document.querySelector(".bar").setAttribute("aria-valuenow", state.done);
  document.querySelector(".bar").setAttribute("aria-valuemax", state.total);
  find("own").textContent = `${state.own.toLocaleString("en")} by `;
  find("rename").textContent = rater;
  find("rename").title = "Label under another name";
  find("undo").disabled = !state.own;
  find("pair").hidden = !pair;
  find("end").hidden = Boolean(pair);
  if (pair) showPair();
  else showEnd(state);
}

function showPair() {
  showTexts();
  for (const card of document.querySelectorAll("article")) card.classList.remove("chosen");
  window.scrollTo(0, 0);
  shownAt = performance.now();
}

function showTexts() {
  find("question").replaceChildren(...pair.question.map((turn, number) => showTurn(turn, number)));
  for (const side of ["left", "right"]) showText(find(side), pair[side], pair.html[side]);
}

// A text without HTML is one whose rendering would hide it.
function showText(place, source, html) {
  const isRendered = html !== "" && !isSource;
  place.classList.toggle("rendered", isRendered);
  place.classList.toggle("source", !isRendered);
  if (isRendered) place.innerHTML = html;
  else place.textContent = source;
}

function showTurn(turn, number) {
  const shown = document.createElement("div");
  shown.className = number < pair.question.length - 1 ? "turn earlier" : "turn";
  if (pair.question.length > 1) {
    const role = document.createElement("b");
    role.textContent = turn.role;
    shown.append(role);
  }
  const text = document.createElement("div");
  text.className = "text";
  showText(text, turn.content, pair.html.question[number]);
  shown.append(text);
  return shown;
}

function showEnd(state) {
  find("end-title").textContent = state.is_complete ? "All pairs have a label" : "There is no pair left for you";
  find("end-text").textContent = state.is_complete
    ? "Thank you. The round goes on with these labels; until it does, you can still undo your last one."
    : "Others have the last pairs on their screens. Load this page again in a few minutes: pairs that they leave come back.";
}

function askName() {
  document.body.classList.add("waits");
  for (const id of ["pair", "end"]) find(id).hidden = true;
  pair = null;
  find("who").hidden = false;
  find("name").value = rater;
  find("name").focus();
}

function decide(verdict) {
  if (!pair || isBusy) return;
  const seconds = (performance.now() - shownAt) / 1000;
  const card = { left: 0, right: 1 }[verdict];
  if (card !== undefined) document.querySelectorAll("article")[card].classList.add("chosen");
  change("label", { pair_id: pair.pair_id, verdict, seconds }, card === undefined ? 0 : SEEN);
}

function undo() {
  if (!find("undo").disabled) change("undo", {});
}

function toggleView() {
  isSource = !isSource;
  localStorage.setItem("view", isSource ? "source" : "rendered");
  showView();
  if (pair) showTexts();
}

function showView() {
  find("view").setAttribute("aria-pressed", String(isSource));
}

function toggleHelp() {
  find("help").hidden = !find("help").hidden;
  find("keys").setAttribute("aria-expanded", String(!find("help").hidden));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || event.target.tagName === "INPUT") return;
  if (event.key.startsWith("Arrow") && event.target.closest("pre, table")) return; // scrolls it
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "u" || key === "Backspace") undo();
  else if (key === "m") toggleView();
  else if (key === "?") toggleHelp();
  else if (KEYS[key]) decide(KEYS[key]);
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", () => decide(button.dataset.verdict));
}
find("undo").addEventListener("click", undo);
find("view").addEventListener("click", toggleView);
find("keys").addEventListener("click", toggleHelp);
find("rename").addEventListener("click", askName);
find("who").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = find("name").value.trim();
  localStorage.setItem("rater", rater);
  change("next", {});
});
showView();
if (rater) change("next", {});
else askName();
