// The list of classes: a search, an order, and the class that an address names. Without this script
// the list stands as it is.
const byId = (id) => document.getElementById(id);
const list = byId("classes");
const items = [...list.children];
const texts = new Map(items.map((item) => [item, item.firstElementChild.textContent.toLowerCase()]));

function show() {
  const words = byId("search").value.trim().toLowerCase();
  for (const item of items)
    item.hidden = !texts.get(item).includes(words) || (byId("back").checked && !("back" in item.dataset));
  byId("status").textContent = `${items.filter((item) => !item.hidden).length} of ${items.length}`;
}

function sort() {
  const key = byId("order").value;
  const sign = key === "place" ? 1 : -1;
  items.sort((one, other) =>
    key === "name"
      ? one.dataset.name.localeCompare(other.dataset.name, "en", { numeric: true })
      : sign * (one.dataset[key] - other.dataset[key]),
  );
  list.append(...items);
}

function open() {
  const item = byId(location.hash.slice(1));
  if (items.includes(item)) item.open = true;
}

for (const id of ["search", "back"]) byId(id).addEventListener("input", show);
byId("order").addEventListener("input", sort);
window.addEventListener("hashchange", open);
byId("filters").hidden = false;
show();
open();
