// Elements and numbers. Texts become text nodes: nothing that a name holds is ever read as markup.
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// Of an accuracy [value, low, high, n]; without an image all but n are null.
const valueOf = ([value]) => value;
const boundsOf = ([, low, high]) => (low === null ? null : [low, high]);
const sized = (accuracy) => accuracy[3];

const DASH = "–";
const word = (value) => String(value ?? DASH);
const fixed = (value, digits) =>
  value === null ? DASH : value.toFixed(digits).replace("-", "−");
const plain = (value) => (value === null ? DASH : fixed(100 * value, 1));
const percent = (value) => (value === null ? DASH : `${plain(value)}\u00a0%`);
const points = (value) => {
  if (value === null) return DASH;
  const text = Math.abs(value).toFixed(1);
  return text === "0.0" ? text : (value < 0 ? "−" : "+") + text;
};
const interval = (accuracy) => {
  const bounds = boundsOf(accuracy);
  return bounds ? `${plain(bounds[0])} to ${plain(bounds[1])}` : "";
};
const counted = (count, one, many) => `${count} ${count === 1 ? one : many}`;
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// A table from a head of titles and rows of cells; the first cell of a row is its header. A title
// that ends in "#" is a column of numbers.
function table(caption, head, rows) {
  const numeric = head.map((title) => title.endsWith("#"));
  const column = (index) => (numeric[index] ? { class: "n" } : {});
  return h(
    "div",
    { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    h(
      "table",
      {},
      h("caption", { class: "hide" }, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          head.map((title, index) =>
            h("th", { scope: "col", ...column(index) }, title.replace(/#$/, "")),
          ),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((cells) =>
          h(
            "tr",
            {},
            cells.map((cell, index) =>
              index === 0
                ? h("th", { scope: "row", ...column(index) }, cell)
                : h("td", column(index), cell),
            ),
          ),
        ),
      ),
    ),
  );
}

// The two columns that an accuracy takes in a table.
const cells = (accuracy) => [plain(valueOf(accuracy)), interval(accuracy)];

// A chart with its numbers as a table, for whoever cannot see it.
const figure = (chart, numbers, ...words) =>
  h(
    "figure",
    {},
    chart,
    words.length ? h("figcaption", {}, words) : null,
    h("details", { class: "numbers" }, h("summary", {}, "Numbers of this chart"), numbers),
  );

// A place that draws itself again whenever its width changes (a turned phone, a resized window).
const drawings = new WeakMap();
const widths = new ResizeObserver((entries) =>
  requestAnimationFrame(() => {
    for (const { target } of entries) {
      const width = Math.floor(target.clientWidth);
      const known = drawings.get(target);
      if (!known || !width || known.width === width) continue;
      known.width = width;
      target.replaceChildren(known.draw(width));
      const wide = target.scrollWidth > target.clientWidth; // who cannot point must be able to scroll
      for (const [key, value] of [
        ["tabindex", "0"],
        ["role", "region"],
        ["aria-label", known.label],
      ]) {
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
