// Elements and numbers. Texts become text nodes: nothing that a name holds is ever read as markup.
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

// What is null, false or empty among attributes and children is left out, so that
// `condition && h(...)` is a child.
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter(Boolean));
  return node;
}
// h("p", {class: "note"}, ...children), or without attributes h("p", ...children).
function h(tag, ...parts) {
  const attributes = parts[0]?.constructor === Object ? parts.shift() : {};
  return fill(document.createElement(tag), attributes, parts);
}
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
const proper = (name) => h("span", { class: "name" }, name);

// Of an accuracy [value, low, high, n]; without an image all but n are null.
const valueOf = ([value]) => value;
const boundsOf = ([, low, high]) => (low === null ? null : [low, high]);

const DASH = "–";
const word = (value) => String(value ?? DASH);
const fixed = (value, digits) => (value === null ? DASH : value.toFixed(digits).replace("-", "−"));
const plain = (value) => (value === null ? DASH : fixed(100 * value, 1));
const percent = (value) => (value === null ? DASH : `${plain(value)}\u00a0%`);
const points = (value) => {
  const text = value === null ? DASH : Math.abs(value).toFixed(1);
  return text === DASH || text === "0.0" ? text : (value < 0 ? "−" : "+") + text;
};
const interval = (accuracy) => boundsOf(accuracy)?.map(plain).join(" to ") ?? "";
const counted = (count, one, many) => `${count} ${count === 1 ? one : many}`;
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// A table that scrolls, from a head of titles and bodies of rows. A title that ends in "#" is a
// column of numbers.
const isNumeric = (title) => title.endsWith("#");
function grid(label, caption, head, bodies, size = "scroll") {
  const titles = head.map((title) =>
    h("th", { scope: "col", class: isNumeric(title) && "n" }, title.replace(/#$/, "")),
  );
  return h(
    "div",
    { class: size, role: "region", "aria-label": label, tabindex: "0" },
    h("table", h("caption", { class: "hide" }, caption), h("thead", h("tr", titles)), bodies),
  );
}

// The same from rows of cells; the first cell of a row is its header.
function table(caption, head, rows) {
  const cell = (content, index) => {
    const attributes = { class: isNumeric(head[index]) && "n", scope: index === 0 && "row" };
    return h(index === 0 ? "th" : "td", attributes, content);
  };
  const body = rows.map((cells) => h("tr", cells.map(cell)));
  return grid(caption, caption, head, h("tbody", body));
}

// A chart with its numbers as a table, for whoever cannot see it.
const figure = (chart, numbers, words) =>
  h(
    "figure",
    chart,
    words && h("figcaption", words),
    h("details", { class: "numbers" }, h("summary", "Numbers of this chart"), numbers),
  );

// A place that draws itself again whenever its width changes (a turned phone, a resized window).
const drawings = new WeakMap();
const widths = new ResizeObserver((entries) =>
  requestAnimationFrame(() => {
    for (const { target } of entries) {
      const known = drawings.get(target);
      const width = Math.floor(target.clientWidth);
      if (!width || known.width === width) continue;
      known.width = width;
      target.replaceChildren(known.draw(width));
      const wide = target.scrollWidth > target.clientWidth; // who cannot point must be able to scroll
      const region = { tabindex: "0", role: "region", "aria-label": known.label };
      for (const [key, value] of Object.entries(region)) {
        if (wide) target.setAttribute(key, value);
        else target.removeAttribute(key);
      }
    }
  }),
);
function drawn(label, draw) {
  const place = h("div", { class: "drawing" });
  drawings.set(place, { draw, label, width: 0 });
  widths.observe(place);
  return place;
}
