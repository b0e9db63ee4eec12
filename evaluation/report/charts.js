// Charts as inline SVG, drawn for the width at hand. Each has a title and a description; the
// numbers stand in a table beside it.
const ROW = 26;
const GLYPH = 6.3; // about the width of a letter, in pixels
const FULL = [0, 0.25, 0.5, 0.75, 1];
const TITLES = {
  after: "after forgetting",
  before: "before forgetting",
  no_text: "without any text of it",
  control: "another class",
};

function canvas(width, height, title, description, ...marks) {
  const size = { viewBox: `0 0 ${width} ${height}`, width, height };
  const spoken = { role: "img", "aria-label": `${title}. ${description}` };
  const words = [s("title", {}, title), s("desc", {}, description)];
  return s("svg", { class: "chart", ...size, ...spoken }, words, marks);
}

const text = (x, y, words, anchor = "start", name = null) =>
  s("text", { x, y, "text-anchor": anchor, class: name }, words);
const line = (name, d) => s("path", { class: name, d });
// A name that may be too long for its place ends before x.
const named = (x, y, words, width) =>
  s(
    "text",
    { x, y, "text-anchor": "end", class: "name" },
    s("title", {}, words),
    cut(words, Math.max(4, Math.floor(width / GLYPH))),
  );

const MARKS = {
  before: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
  after: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
  no_text: "M0-5 5 4h-10Z",
  control: "M-4-4h8v8h-8Z",
};
const mark = (name, x, y) =>
  s("path", { class: `mark ${name}`, d: MARKS[name], transform: `translate(${x} ${y})` });

function legend(...entries) {
  const key = { class: "key wide-key", viewBox: "-14 -7 28 14", "aria-hidden": "true" };
  const items = entries.map(([name, words]) =>
    h("li", s("svg", key, line(`line ${name}`, "M-14 0H14"), mark(name, 0, 0)), " ", words),
  );
  return h("ul", { class: "legend" }, items);
}

// A row for each of `rows`, its name on the left; `draw` gives what stands right of `left`.
function rowed(title, rows, below, told, draw) {
  return drawn(title, (width) => {
    const left = Math.min(210, Math.floor(width * 0.38));
    const height = rows.length * ROW + 8;
    const lines = rows.map((row, index) => {
      const y = 4 + ROW * (index + 0.5);
      return [named(left - 12, y + 4, row.name, left - 14), draw.row(row, y, left, width)];
    });
    const description = rows.map(told).join("; ");
    return canvas(width, height + below, title, description, draw.axis?.(left, width, height), lines);
  });
}

// Rows {name, before, after}: where an accuracy was, and where it went.
function dumbbell(title, rows) {
  const at = (share, left, width) => left + (width - left - 24) * share;
  const told = (row) =>
    `${row.name} ${percent(valueOf(row.before))} before, ${percent(valueOf(row.after))} after`;
  return rowed(title, rows, 24, told, {
    axis: (left, width, bottom) =>
      FULL.map((share) => {
        const x = at(share, left, width);
        const label = share === 1 ? "100 %" : String(100 * share);
        return [line("grid", `M${x} 4V${bottom}`), text(x, bottom + 16, label, "middle")];
      }),
    row: ({ before, after }, y, left, width) => {
      const place = (share) => share !== null && at(share, left, width);
      const [start, end] = [place(valueOf(before)), place(valueOf(after))];
      const [low, high] = (boundsOf(after) ?? []).map(place);
      const ends = `M${low} ${y - 4}v8M${high} ${y - 4}v8`;
      return [
        start !== false && end !== false && line("way", `M${start} ${y}H${end}`),
        boundsOf(after) && line("whisker", `M${low} ${y}H${high}${ends}`),
        start !== false && mark("before", start, y),
        end !== false && mark("after", end, y),
      ];
    },
  });
}

// Rows {name, before, after}: shares of the images, before as a tick beside the bar.
function bars(title, rows) {
  const most = Math.max(0.01, ...rows.flatMap((row) => [row.before, row.after])); // null is 0
  const told = (row) => `${row.name} ${percent(row.after)} after, ${percent(row.before)} before`;
  return rowed(title, rows, 0, told, {
    row: ({ before, after }, y, left, width) => {
      const to = (share) => left + ((width - left - 64) * share) / most;
      const bar = { class: "bar", x: left, y: y - 7, width: to(after) - left, height: 14 };
      return [
        line("base", `M${left} ${y - ROW / 2}v${ROW}`),
        after && s("rect", bar),
        before && line("tick", `M${to(before)} ${y - 11}v22`),
        text(to(Math.max(before, after)) + 8, y + 4, plain(after)),
      ];
    },
  });
}

// Counts, a row a true class and a column a predicted one; shading is the share of the row.
function heat(title, names, columns, counts) {
  const [cell, left, top] = [27, 122, 104];
  const told = names.map((name, row) => {
    const most = Math.max(...counts[row]);
    const where = columns[counts[row].indexOf(most)];
    return most ? `${name}: most often taken for ${where}` : `${name}: no images`;
  });
  const heads = columns.map((name, column) => {
    const transform = `translate(${left + cell * (column + 0.6)} ${top - 8}) rotate(-50)`;
    return s("text", { class: "name", transform }, s("title", {}, name), cut(name, 17));
  });
  const lines = names.map((name, row) => {
    const y = top + cell * row;
    const sum = counts[row].reduce((total, count) => total + count, 0);
    const cells = counts[row].map((count, column) => {
      const x = left + cell * column;
      const size = { x: x + 0.5, y: y + 0.5, width: cell - 1, height: cell - 1 };
      const words = `${name} taken for ${columns[column]}: ${count} of ${sum}`;
      const style = `--share:${sum ? count / sum : 0}`;
      return [
        s("rect", { class: "cell", ...size, style }, s("title", {}, words)),
        count && text(x + cell / 2, y + cell / 2 + 4, String(count), "middle", "count"),
      ];
    });
    return [named(left - 8, y + cell / 2 + 4, name, left - 10), cells];
  });
  const [width, height] = [left + cell * columns.length + 34, top + cell * names.length + 4];
  return h(
    "div",
    { class: "drawing", tabindex: "0", role: "region", "aria-label": title },
    canvas(width, height, title, told.join("; "), heads, lines),
  );
}

// Accuracy against the number of examples: series {name, values} of accuracies, name one of MARKS.
function curves(title, steps, series) {
  const told = series.map(({ name, values }) => {
    const each = values.map((value, index) => `${percent(valueOf(value))} with ${steps[index]}`);
    return `${TITLES[name]}: ${each.join(", ")}`;
  });
  return drawn(title, (width) => {
    const [left, right, top, height] = [40, 16, 10, 170];
    const span = (width - left - right - 8) / Math.max(1, steps.length - 1);
    const at = (index) => left + 8 + span * (steps.length < 2 ? 0.5 : index);
    const to = (share) => top + height * (1 - share);
    const plot = ({ name, values }) => {
      const known = values
        .map((value, index) => ({ x: at(index), y: valueOf(value), bounds: boundsOf(value) }))
        .filter(({ y }) => y !== null);
      const whiskers = known
        .filter(({ bounds }) => bounds && name === "after")
        .map(({ x, bounds }) => line("whisker", `M${x} ${to(bounds[0])}V${to(bounds[1])}`));
      const way = known.map(({ x, y }) => `${x} ${to(y)}`).join("L");
      const marks = known.map(({ x, y }) => mark(name, x, to(y)));
      return [line(`line ${name}`, way && `M${way}`), whiskers, marks];
    };
    return canvas(
      width,
      top + height + 44,
      title,
      told.join("; "),
      FULL.map((share) => [
        line("grid", `M${left} ${to(share)}H${width - right}`),
        text(left - 8, to(share) + 4, String(100 * share), "end"),
      ]),
      steps.map((step, index) => text(at(index), top + height + 18, word(step), "middle")),
      text(left, top + height + 38, "examples of the class", "start", "axis"),
      [...series].reverse().map(plot), // the last drawn lies on top: the class after forgetting
    );
  });
}
