// The list of classes: a search and an order. Without this script the list stands as it is.
const byId = (id) => document.getElementById(id);
const items = [...byId("classes").children];

function show() {
  const key = byId("order").value;
  items.sort((one, { dataset: other }) =>
    key === "name"
      ? one.dataset.name.localeCompare(other.name, "en", { numeric: true })
      : (key === "place" ? 1 : -1) * (one.dataset[key] - other[key]),
  );
  for (const item of items) {
    const found = item.firstElementChild.textContent.toLowerCase().includes(byId("search").value.trim().toLowerCase());
    item.hidden = !found || (byId("back").checked && !("back" in item.dataset));
  }
  byId("classes").append(...items);
  byId("status").textContent = `${items.filter((item) => !item.hidden).length} of ${items.length}`;
}

byId("filters").addEventListener("input", show);
byId("filters").hidden = false;
show();
