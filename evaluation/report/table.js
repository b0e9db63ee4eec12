// The table of classes: sorting, filters, and one class's details on demand. Without this script
// the table stands as it is.
const body = document.querySelector("#classes tbody");
const rows = [...body.rows];
const titles = [...document.querySelectorAll("#classes thead th")];
const panel = byId("details");
const status = byId("status");
const shown = () => rows.filter((row) => !row.hidden);

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
  const keyed = rows.map((row) => [keyOf(row, column), row]);
  keyed.sort(([one], [other]) => {
    if (one === null || other === null) return (one === null) - (other === null); // unmeasured last
    return sign * (isNumber(column) ? one - other : collator.compare(one, other));
  });
  rows.splice(0, rows.length, ...keyed.map(([, row]) => row));
  body.append(...rows);
  say(`, sorted by ${title.textContent}, ${order}`);
}

titles.forEach((title, column) => {
  const button = h("button", { type: "button" }, title.textContent);
  button.addEventListener("click", () => sortBy(column));
  title.replaceChildren(button);
});

// Filters

const filters = {
  text: byId("filter-text"),
  dataset: byId("filter-dataset"),
  run: byId("filter-run"),
  back: byId("filter-back"),
};
const texts = new Map(); // row -> its text, once it was searched

function textOf(row) {
  if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
  return texts.get(row);
}

function say(more = "") {
  status.textContent = `${shown().length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows${more}`;
}

function filter() {
  const words = filters.text.value.trim().toLowerCase();
  const dataset = filters.dataset.selectedIndex > 0 ? filters.dataset.value : null;
  const run = filters.run ? filters.run.value : "";
  for (const row of rows) {
    row.hidden = Boolean(
      (dataset !== null && row.dataset.dataset !== dataset) ||
      (run && row.dataset.run !== run) ||
      (filters.back.checked && !("back" in row.dataset)) ||
      (words && !textOf(row).includes(words)),
    );
  }
  say();
}

for (const field of Object.values(filters)) if (field) field.addEventListener("input", filter);
byId("filters").hidden = false;
filter();

// Details

let current = null;
const nameOf = (row) => row.cells[0].querySelector("a").textContent;
const idOf = (row) => row.id.slice(1);

// The same class in every folder that has it.
function peers(row) {
  const same = rows.filter(
    (other) => other.dataset.dataset === row.dataset.dataset && nameOf(other) === nameOf(row),
  );
  if (!filters.run || same.length < 2) return null;
  const folder = titles.indexOf(byId("folder"));
  const columns = [folder, ...titles.keys()].filter((column, place) => !place || isNumber(column));
  const head = columns.map((column) => titles[column].textContent + (isNumber(column) ? "#" : ""));
  return h(
    "section",
    { class: "whole" },
    h("h4", {}, "In every folder"),
    table(
      "The class in every folder",
      head,
      same.map((other) =>
        columns.map((column) => {
          const copies = [...other.cells[column].childNodes].map((node) => node.cloneNode(true));
          if (column !== folder) return copies;
          return other === row
            ? [copies, " (shown here)"]
            : h("a", { href: `#${other.id}` }, copies);
        }),
      ),
    ),
  );
}

function step(row, by) {
  const order = shown();
  return order[order.indexOf(row) + by] || null;
}

function open(row) {
  const data = JSON.parse(byId(`d${idOf(row)}`).textContent);
  for (const other of rows) other.removeAttribute("aria-current");
  row.setAttribute("aria-current", "true");
  current = row;
  const button = (words, target, label) => {
    const node = h(
      "button",
      { type: "button", "aria-label": label, disabled: target ? null : "" },
      words,
    );
    node.addEventListener("click", () => go(target));
    return node;
  };
  const back = h("button", { type: "button" }, "Back to the table");
  back.addEventListener("click", () => row.cells[0].querySelector("a").focus());
  const [before, after] = data.own;
  panel.replaceChildren(
    h(
      "div",
      { class: "bar-of-buttons" },
      back,
      button("← Previous", step(row, -1), "Previous class"),
      button("Next →", step(row, 1), "Next class"),
    ),
    h("h3", { id: "details-title", class: "name" }, data.name || "(no name)"),
    h(
      "p",
      { class: "lead" },
      data.dataset,
      filters.run ? `, ${data.run}` : "",
      data.together > 1
        ? `, forgotten together with ${counted(data.together - 1, "other class", "other classes")}`
        : "",
      data.method ? `. ${data.method}` : "",
    ),
    h(
      "dl",
      { class: "tiles" },
      tile(
        "The class",
        `${plain(before)} → ${plain(after)}`,
        "%",
        data.interval.after
          ? `95 % interval after: ${plain(data.interval.after[0])} to ${plain(data.interval.after[1])}\u00a0%`
          : "no interval: not audited",
      ),
      tile("Rest of its set", ...pointsOf(data.rest)),
      ...Object.entries(data.others).map(([name, both]) => tile(name, ...pointsOf(both))),
    ),
    data.verdict.length
      ? h(
          "ul",
          { class: "findings" },
          data.verdict.map((line) => h("li", {}, line)),
        )
      : "",
    h("div", { class: "sections" }, [peers(row), ...sections(data)].filter(Boolean)),
  );
}

const pointsOf = ([before, after]) => [
  points(before === null || after === null ? null : 100 * (after - before)),
  "points",
  `${plain(before)} → ${plain(after)}\u00a0%`,
];
const tile = (title, value, unit, sub) =>
  h(
    "div",
    {},
    h("dt", {}, title),
    h("dd", {}, value, " ", h("span", { class: "unit" }, unit)),
    h("dd", { class: "sub" }, sub),
  );

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

body.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(link.closest("tr"));
});
panel.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#r"]');
  if (!link) return;
  event.preventDefault();
  go(byId(link.getAttribute("href").slice(1)));
});
const chart = document.querySelector("svg.frontier");
if (chart) {
  chart.addEventListener("click", (event) => {
    const point = event.target.closest("[data-row]");
    if (point) go(byId(`r${point.dataset.row}`));
  });
}
window.addEventListener("popstate", fromAddress);
fromAddress();
if (rows.length === 1) open(rows[0]);
