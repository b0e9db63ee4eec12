// Charts as inline SVG, drawn for the width at hand. Each has a title and a description; the
// numbers stand in a table beside it.
const ROW = 26;
const GLYPH = 6.3; // about the width of a letter, in pixels
const FULL = [0, 0.25, 0.5, 0.75, 1];

function canvas(width, height, title, description, ...marks) {
  return s(
    "svg",
    {
      class: "chart",
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "img",
      "aria-label": `${title}. ${description}`,
    },
    s("title", {}, title),
    s("desc", {}, description),
    marks,
  );
}

const text = (x, y, words, anchor = "start", name = null) =>
  s("text", { x, y, "text-anchor": anchor, class: name }, words);
const named = (x, y, words, width, anchor = "end") =>
  s(
    "text",
    { x, y, "text-anchor": anchor, class: "name" },
    s("title", {}, words),
    cut(words, Math.max(4, Math.floor(width / GLYPH))),
  );

function percentAxis(at, top, bottom) {
  return FULL.map((share) => [
    s("path", { class: "grid", d: `M${at(share)} ${top}V${bottom}` }),
    text(at(share), bottom + 16, share === 1 ? "100 %" : String(100 * share), "middle"),
  ]);
}

const legend = (...entries) =>
  h(
    "ul",
    { class: "legend" },
    entries.map(([name, words]) =>
      h(
        "li",
        {},
        s(
          "svg",
          { class: "key wide-key", viewBox: "-14 -7 28 14", "aria-hidden": "true" },
          sample(name),
        ),
        " ",
        words,
      ),
    ),
  );

const MARKS = {
  before: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
  after: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
  no_text: "M0-5 5 4h-10Z",
  control: "M-4-4h8v8h-8Z",
};
const mark = (name, x, y) =>
  s("path", { class: `mark ${name}`, d: MARKS[name], transform: `translate(${x} ${y})` });
const sample = (name) => [s("path", { class: `line ${name}`, d: "M-14 0H14" }), mark(name, 0, 0)];

// Rows {name, note, before, after}: where an accuracy was, and where it went.
function dumbbell(title, rows) {
  const told = rows.map(
    (row) =>
      `${row.name} ${percent(valueOf(row.before))} before, ${percent(valueOf(row.after))} after`,
  );
  return drawn(title, (width) => {
    const left = Math.min(210, Math.floor(width * 0.38));
    const at = (share) => left + (width - left - 24) * share;
    const bottom = rows.length * ROW + 8;
    return canvas(
      width,
      bottom + 24,
      title,
      told.join("; "),
      percentAxis(at, 4, bottom),
      rows.map((row, index) => {
        const y = 8 + ROW * (index + 0.5);
        const [before, after] = [valueOf(row.before), valueOf(row.after)];
        const bounds = boundsOf(row.after);
        return [
          named(left - 12, y + 4, row.name, left - 14),
          before !== null &&
            after !== null &&
            s("path", { class: "way", d: `M${at(before)} ${y}H${at(after)}` }),
          bounds &&
            s("path", {
              class: "whisker",
              d: `M${at(bounds[0])} ${y}H${at(bounds[1])}M${at(bounds[0])} ${y - 4}v8M${at(bounds[1])} ${y - 4}v8`,
            }),
          before !== null && mark("before", at(before), y),
          after !== null && mark("after", at(after), y),
        ].filter(Boolean);
      }),
    );
  });
}

// Rows {name, before, after}: shares of the images, before as a tick beside the bar.
function bars(title, rows) {
  const most = Math.max(0.01, ...rows.map((row) => Math.max(row.before, row.after)));
  const told = rows.map(
    (row) => `${row.name} ${percent(row.after)} after, ${percent(row.before)} before`,
  );
  return drawn(title, (width) => {
    const left = Math.min(210, Math.floor(width * 0.38));
    const span = (share) => ((width - left - 64) * share) / most;
    return canvas(
      width,
      rows.length * ROW + 8,
      title,
      told.join("; "),
      rows.map((row, index) => {
        const y = 4 + ROW * index;
        const end = Math.max(row.before, row.after); // null is 0
        return [
          named(left - 12, y + 17, row.name, left - 14),
          s("path", { class: "base", d: `M${left} ${y}v${ROW}` }),
          row.after
            ? s("rect", { class: "bar", x: left, y: y + 6, width: span(row.after), height: 14 })
            : null,
          row.before
            ? s("path", { class: "tick", d: `M${left + span(row.before)} ${y + 2}v22` })
            : null,
          text(left + span(end) + 8, y + 17, plain(row.after)),
        ].filter(Boolean);
      }),
    );
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
  const width = left + cell * columns.length + 34;
  return h(
    "div",
    { class: "drawing", tabindex: "0", role: "region", "aria-label": title },
    canvas(
      width,
      top + cell * names.length + 4,
      title,
      told.join("; "),
      columns.map((name, column) =>
        s(
          "text",
          {
            class: "name",
            transform: `translate(${left + cell * (column + 0.6)} ${top - 8}) rotate(-50)`,
          },
          s("title", {}, name),
          cut(name, 17),
        ),
      ),
      names.map((name, row) => {
        const sum = counts[row].reduce((total, count) => total + count, 0);
        return [
          named(left - 8, top + cell * (row + 0.5) + 4, name, left - 10),
          columns.map((other, column) => {
            const count = counts[row][column];
            const [x, y] = [left + cell * column, top + cell * row];
            return [
              s(
                "rect",
                {
                  class: "cell",
                  x: x + 0.5,
                  y: y + 0.5,
                  width: cell - 1,
                  height: cell - 1,
                  style: `--share:${sum ? count / sum : 0}`,
                },
                s("title", {}, `${name} taken for ${other}: ${count} of ${sum}`),
              ),
              count ? text(x + cell / 2, y + cell / 2 + 4, String(count), "middle", "count") : null,
            ];
          }),
        ];
      }),
    ),
  );
}

// Accuracy against the number of examples: series {name, values} of accuracies, name one of MARKS.
function curves(title, steps, series) {
  const told = series.map(
    ({ name, values }) =>
      `${TITLES[name]}: ${values.map((value, index) => `${percent(valueOf(value))} with ${steps[index]}`).join(", ")}`,
  );
  return drawn(title, (width) => {
    const [left, right, top, height] = [40, 16, 10, 170];
    const at = (index) =>
      left + 8 + (width - left - right - 8) * (steps.length < 2 ? 0.5 : index / (steps.length - 1));
    const to = (share) => top + height * (1 - share);
    return canvas(
      width,
      top + height + 44,
      title,
      told.join("; "),
      FULL.map((share) => [
        s("path", { class: "grid", d: `M${left} ${to(share)}H${width - right}` }),
        text(left - 8, to(share) + 4, String(100 * share), "end"),
      ]),
      steps.map((step, index) => text(at(index), top + height + 18, word(step), "middle")),
      text(left, top + height + 38, "examples of the class", "start", "axis"),
      // The last drawn lies on top: the class after forgetting.
      [...series].reverse().map(({ name, values }) => {
        const known = values
          .map((value, index) => [at(index), valueOf(value), boundsOf(value)])
          .filter(([, value]) => value !== null);
        return [
          s("path", {
            class: `line ${name}`,
            d: known.map(([x, value], index) => `${index ? "L" : "M"}${x} ${to(value)}`).join(""),
          }),
          name === "after"
            ? known
                .filter(([, , bounds]) => bounds)
                .map(([x, , bounds]) =>
                  s("path", { class: "whisker", d: `M${x} ${to(bounds[0])}V${to(bounds[1])}` }),
                )
            : [],
          known.map(([x, value]) => mark(name, x, to(value))),
        ];
      }),
    );
  });
}
const TITLES = {
  after: "after forgetting",
  before: "before forgetting",
  no_text: "without any text of it",
  control: "another class",
};
