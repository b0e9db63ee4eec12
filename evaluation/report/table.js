// The table of classes: sorting, filters, and one class's details on demand. Without this script
// the table stands as it is.
const body = document.querySelector("#classes tbody");
const rows = [...body.rows];
const titles = [...document.querySelectorAll("#classes thead th")];
const panel = byId("details");
const shown = () => rows.filter((row) => !row.hidden);

function say(more = "") {
  const [some, all] = [shown().length, rows.length].map((count) => count.toLocaleString("en"));
  byId("status").textContent = `${some} of ${all} rows${more}`;
}

// Sorting

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
const isNumber = (column) => titles[column].classList.contains("n");

function keyOf(row, column) {
  const cell = row.cells[column];
  if (!isNumber(column)) return cell.textContent.trim();
  return cell.dataset.v === "" ? null : Number(cell.dataset.v);
}

function sortBy(column) {
  const title = titles[column];
  // Names begin with A, numbers with the largest; a second press turns the order round.
  const first = isNumber(column) ? "descending" : "ascending";
  const now = title.getAttribute("aria-sort");
  const order = now === null ? first : now === "ascending" ? "descending" : "ascending";
  for (const other of titles) other.removeAttribute("aria-sort");
  title.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const keys = new Map(rows.map((row) => [row, keyOf(row, column)]));
  rows.sort((row, next) => {
    const [one, other] = [keys.get(row), keys.get(next)];
    if (one === null || other === null) return (one === null) - (other === null); // unmeasured last
    return sign * (isNumber(column) ? one - other : collator.compare(one, other));
  });
  body.append(...rows);
  say(`, sorted by ${title.textContent}, ${order}`);
}

function button(words, press, attributes = {}) {
  const node = h("button", { type: "button", ...attributes }, words);
  node.addEventListener("click", press);
  return node;
}

titles.forEach((title, column) =>
  title.replaceChildren(button(title.textContent, () => sortBy(column))),
);

// Filters

const [search, dataset, folder, back] = ["text", "dataset", "run", "back"].map((name) =>
  byId(`filter-${name}`),
); // no folder where there is one
const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

function filter() {
  const words = search.value.trim().toLowerCase();
  for (const row of rows) {
    row.hidden =
      (dataset.selectedIndex > 0 && row.dataset.dataset !== dataset.value) ||
      (folder?.value && row.dataset.run !== folder.value) ||
      (back.checked && !("back" in row.dataset)) ||
      !texts.get(row).includes(words);
  }
  say();
}

byId("filters").addEventListener("input", filter);
byId("filters").hidden = false;
filter();

// Details

let current = null;
const linkOf = (row) => row.cells[0].querySelector("a");

// The same class in every folder that has it.
function peers(row) {
  const same = rows.filter(
    (other) =>
      other.dataset.dataset === row.dataset.dataset &&
      linkOf(other).textContent === linkOf(row).textContent,
  );
  if (!folder || same.length < 2) return null;
  const place = titles.indexOf(byId("folder"));
  const numbers = [...titles.keys()].filter(isNumber);
  const copy = (other, column) => [...other.cells[column].childNodes].map((n) => n.cloneNode(true));
  const lines = same.map((other) => [
    other === row
      ? [copy(other, place), " (shown here)"]
      : h("a", { href: `#${other.id}` }, copy(other, place)),
    ...numbers.map((column) => copy(other, column)),
  ]);
  const head = ["Folder", ...numbers.map((column) => `${titles[column].textContent}#`)];
  const copies = table("The class in every folder", head, lines);
  return section("In every folder", { class: "whole" }, copies);
}

const tile = (title, value, unit, sub) =>
  h(
    "div",
    h("dt", title),
    h("dd", value, " ", h("span", { class: "unit" }, unit)),
    h("dd", { class: "sub" }, sub),
  );
function changeTile(title, [before, after]) {
  const change = before === null || after === null ? null : 100 * (after - before);
  return tile(title, points(change), "points", `${plain(before)} → ${plain(after)}\u00a0%`);
}

function open(row) {
  const data = JSON.parse(byId(`d${row.id.slice(1)}`).textContent);
  for (const other of rows) other.removeAttribute("aria-current");
  row.setAttribute("aria-current", "true");
  current = row;
  const order = shown();
  const step = (words, label, by) => {
    const target = order[order.indexOf(row) + by];
    return button(words, () => go(target), { "aria-label": label, disabled: !target && "" });
  };
  const others = data.together - 1;
  const bounds = data.interval.after?.map(plain).join(" to ");
  panel.replaceChildren(
    h(
      "div",
      { class: "bar-of-buttons" },
      button("Back to the table", () => linkOf(row).focus()),
      step("← Previous", "Previous class", -1),
      step("Next →", "Next class", 1),
    ),
    h("h3", { id: "details-title", class: "name" }, data.name || "(no name)"),
    h(
      "p",
      { class: "lead" },
      data.dataset,
      folder && `, ${data.run}`,
      others > 0 && `, forgotten together with ${counted(others, "other class", "other classes")}`,
      data.method && `. ${data.method}`,
    ),
    h(
      "dl",
      { class: "tiles" },
      tile(
        "The class",
        data.own.map(plain).join(" → "),
        "%",
        bounds ? `95 % interval after: ${bounds}\u00a0%` : "no interval: not audited",
      ),
      changeTile("Rest of its set", data.rest),
      Object.entries(data.others).map(([name, change]) => changeTile(name, change)),
    ),
    data.verdict.length
      ? h("ul", { class: "findings" }, data.verdict.map((finding) => h("li", finding)))
      : "",
    h("div", { class: "sections" }, peers(row), sections(data)),
  );
}

function go(row) {
  history.pushState(null, "", `#${row.id}`);
  show(row);
}

function show(row) {
  open(row);
  panel.scrollIntoView();
  panel.focus({ preventScroll: true });
}

function fromAddress() {
  const row = /^#r\d+$/.test(location.hash) ? byId(location.hash.slice(1)) : null;
  if (row && row !== current) show(row);
}

// Names in the table, other folders of a class, points of the chart.
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#r"], [data-row]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(byId(link.dataset.row ? `r${link.dataset.row}` : link.hash.slice(1)));
});
window.addEventListener("popstate", fromAddress);
fromAddress();
if (rows.length === 1) open(rows[0]);
