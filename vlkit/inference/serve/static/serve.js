"use strict";
// The page of `vlkit serve`. Whatever comes from the data goes into the page as text, never as markup.

const at = (id) => document.getElementById(id);
let latest = 0; // Only the newest question may fill the page.
let again = null; // The question, for when a filter changes.

function made(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function tell(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

function wanted() {
  const how = new URLSearchParams({ k: at("k").value });
  if (at("class").value) how.append("filter", "class=" + at("class").value);
  return how;
}

async function asked(request) {
  const mine = ++latest;
  const began = performance.now();
  tell("searching…");
  try {
    const response = await request();
    const answer = await response.json().catch(() => ({}));
    if (mine !== latest) return;
    if (!response.ok) {
      const what = answer.error || "it failed: " + response.status;
      tell(answer.hint ? what + " (" + answer.hint + ")" : what, true);
      return;
    }
    show(answer.results);
    tell("answered in " + Math.round(performance.now() - began) + " ms");
  } catch (error) {
    if (mine === latest) tell("the server does not answer: is it still running?", true);
  }
}

function query(text, source) {
  at("query").hidden = false;
  at("said").textContent = text;
  if (at("asked").src.startsWith("blob:")) URL.revokeObjectURL(at("asked").src);
  at("asked").hidden = !source;
  if (source) at("asked").src = source;
  else at("asked").removeAttribute("src");
}

function byWords(text) {
  query("“" + text + "”", null);
  again = () => asked(() => fetch("/api/search?" + new URLSearchParams([["q", text], ...wanted()])));
  again();
}

function byPicture(file) {
  query(file.name, URL.createObjectURL(file));
  again = () =>
    asked(() => fetch("/api/search?" + wanted(), { method: "POST", body: file, headers: { "Content-Type": file.type || "image/unknown" } }));
  again();
}

function byEntry(hit) {
  query(hit.text, hit.picture);
  again = () => asked(() => fetch("/api/like?" + new URLSearchParams([["id", hit.id], ...wanted()])));
  again();
  scrollTo({ top: 0 });
}

function hitOf(hit) {
  const item = made("li");
  const button = made("button", "hit");
  button.type = "button";
  if (hit.picture) {
    const picture = made("img");
    picture.src = hit.picture;
    picture.alt = hit.text;
    picture.loading = "lazy";
    button.append(picture);
  }
  const text = made("span", "text", hit.text);
  text.dir = "auto";
  const of = made("span", "of");
  const name = made("span", "", hit.class || "");
  name.dir = "auto";
  of.append(name, made("span", "score", hit.score.toFixed(3)));
  button.append(text, of);
  button.title = "search by this";
  button.addEventListener("click", () => byEntry(hit));
  item.append(button);
  return item;
}

function show(results) {
  const main = at("results");
  main.replaceChildren();
  main.classList.toggle("two", results.length > 1);
  results.forEach((result, index) => {
    const section = made("section");
    if (results.length > 1) section.append(made("h2", "", served[index] ? served[index].label : result.index));
    for (const note of new Set(result.notes)) section.append(made("p", "soft", note));
    for (const [kind, title, className] of [["images", "Pictures", "pictures"], ["texts", "Texts", "texts"]]) {
      const hits = result[kind];
      if (!hits) continue;
      section.append(made("h3", "", hits.length ? title : "no " + title.toLowerCase()));
      const list = made("ul", className);
      list.append(...hits.map(hitOf));
      section.append(list);
    }
    main.append(section);
  });
}

let served = [];

async function begin() {
  served = await (await fetch("/api/indexes")).json();
  for (const each of served) each.label = each.name + (each.untouched ? " (untouched)" : "");
  for (const name of [...new Set(served.flatMap((each) => each.classes))].sort()) {
    const option = made("option", "", name);
    option.value = name;
    at("class").append(option);
  }
  at("class").parentElement.hidden = at("class").options.length < 2;
  tell(served.map((each) => each.label + ": " + each.images.toLocaleString() + " pictures, " + each.texts.toLocaleString() + " texts").join("; "));
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("words").value.trim();
  if (text) byWords(text);
});
at("file").addEventListener("change", () => {
  if (at("file").files.length) byPicture(at("file").files[0]);
  at("file").value = "";
});
for (const id of ["class", "k"]) at(id).addEventListener("change", () => again && again());
at("clear").addEventListener("click", () => {
  latest++;
  again = null;
  at("query").hidden = true;
  at("results").replaceChildren();
  at("words").value = "";
  at("words").focus();
  tell("");
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").hidden = true;
  const files = [...event.dataTransfer.files];
  if (files.length) byPicture(files[0]);
  else tell("that was no picture file", true);
});
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) byPicture(files[0]);
});

begin().catch(() => tell("the server does not answer: is it still running?", true));
