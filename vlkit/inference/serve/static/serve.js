"use strict";
// The page of `vlkit serve`. Everything that comes from the data is inserted as text, never as markup.

const byId = (id) => document.getElementById(id);
let latestRequest = 0; // Only the newest search may fill the page.
let repeatSearch = null; // Runs the current search again when a filter changes.
let indexes = [];

function createElement(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function showStatus(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

function searchOptions() {
  const options = new URLSearchParams({ k: byId("k").value });
  if (byId("class").value) options.append("filter", "class=" + byId("class").value);
  return options;
}

async function runSearch(sendRequest) {
  const number = ++latestRequest;
  const start = performance.now();
  showStatus("searching…");
  try {
    const response = await sendRequest();
    const answer = await response.json().catch(() => ({}));
    if (number !== latestRequest) return;
    if (!response.ok) {
      const message = answer.error || "the search failed with status " + response.status;
      showStatus(answer.hint ? message + " (" + answer.hint + ")" : message, true);
      return;
    }
    showResults(answer.results);
    showStatus("answered in " + Math.round(performance.now() - start) + " ms");
  } catch (error) {
    if (number === latestRequest) showStatus("the server does not answer: is it still running?", true);
  }
}

function showQuery(text, imageUrl) {
  const image = byId("query-image");
  byId("query").hidden = false;
  byId("query-text").textContent = text;
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.hidden = !imageUrl;
  if (imageUrl) image.src = imageUrl;
  else image.removeAttribute("src");
}

function searchText(text) {
  showQuery("“" + text + "”", null);
  repeatSearch = () => runSearch(() => fetch("/api/search?" + new URLSearchParams([["q", text], ...searchOptions()])));
  repeatSearch();
}

function searchImage(file) {
  showQuery(file.name, URL.createObjectURL(file));
  const headers = { "Content-Type": file.type || "image/unknown" };
  repeatSearch = () => runSearch(() => fetch("/api/search?" + searchOptions(), { method: "POST", body: file, headers }));
  repeatSearch();
}

function searchDocument(hit) {
  showQuery(hit.text, hit.picture);
  repeatSearch = () => runSearch(() => fetch("/api/like?" + new URLSearchParams([["id", hit.id], ...searchOptions()])));
  repeatSearch();
  scrollTo({ top: 0 });
}

function createHit(hit) {
  const item = createElement("li");
  const button = createElement("button", "hit");
  button.type = "button";
  if (hit.picture) {
    const image = createElement("img");
    image.src = hit.picture;
    image.alt = hit.text;
    image.loading = "lazy";
    button.append(image);
  }
  const text = createElement("span", "text", hit.text);
  text.dir = "auto";
  const details = createElement("span", "details");
  const className = createElement("span", "", hit.class || "");
  className.dir = "auto";
  details.append(className, createElement("span", "score", hit.score.toFixed(3)));
  button.append(text, details);
  button.title = "search with this";
  button.addEventListener("click", () => searchDocument(hit));
  item.append(button);
  return item;
}

function showResults(results) {
  const main = byId("results");
  main.replaceChildren();
  main.classList.toggle("two", results.length > 1);
  results.forEach((result, number) => {
    const section = createElement("section");
    if (results.length > 1) section.append(createElement("h2", "", indexes[number] ? indexes[number].label : result.index));
    for (const note of new Set(result.notes)) section.append(createElement("p", "soft", note));
    for (const [modality, title] of [["images", "Images"], ["texts", "Texts"]]) {
      const hits = result[modality];
      if (!hits) continue;
      section.append(createElement("h3", "", hits.length ? title : "no " + modality));
      const list = createElement("ul", modality);
      list.append(...hits.map(createHit));
      section.append(list);
    }
    main.append(section);
  });
}

async function loadIndexes() {
  indexes = await (await fetch("/api/indexes")).json();
  for (const index of indexes) index.label = index.name + (index.untouched ? " (untouched)" : "");
  for (const name of [...new Set(indexes.flatMap((index) => index.classes))].sort()) {
    const option = createElement("option", "", name);
    option.value = name;
    byId("class").append(option);
  }
  byId("class").parentElement.hidden = byId("class").options.length < 2;
  const counts = (index) => index.images.toLocaleString() + " images, " + index.texts.toLocaleString() + " texts";
  showStatus(indexes.map((index) => index.label + ": " + counts(index)).join("; "));
}

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (text) searchText(text);
});
byId("file").addEventListener("change", () => {
  if (byId("file").files.length) searchImage(byId("file").files[0]);
  byId("file").value = "";
});
for (const id of ["class", "k"]) byId(id).addEventListener("change", () => repeatSearch && repeatSearch());
byId("clear").addEventListener("click", () => {
  latestRequest++;
  repeatSearch = null;
  byId("query").hidden = true;
  byId("results").replaceChildren();
  byId("text").value = "";
  byId("text").focus();
  showStatus("");
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").hidden = true;
  const files = [...event.dataTransfer.files];
  if (files.length) searchImage(files[0]);
  else showStatus("that is not an image file", true);
});
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) searchImage(files[0]);
});

loadIndexes().catch(() => showStatus("the server does not answer: is it still running?", true));
