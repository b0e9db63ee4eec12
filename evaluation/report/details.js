// One class in detail: a section a measure. A measure may have been left out of the audit.
const note = (words) => h("p", { class: "note" }, words);
const section = (title, attributes, ...content) =>
  h("section", attributes, h("h4", title), content);
const changed = (rows) =>
  rows.filter(({ before, after }) => valueOf(before) !== null || valueOf(after) !== null);
const beforeAfter = () => legend(["before", "before"], ["after", "after, with its 95 % interval"]);

// Accuracies before and after as a chart and as a table, whose first column is called `first`.
function compared(title, caption, first, rows) {
  const head = [first, "Before, %#", "95 % interval#", "After, %#", "95 % interval#", "Images#"];
  const sides = ({ before, after }) => [before, after].flatMap((a) => [plain(valueOf(a)), interval(a)]);
  const cells = rows.map((row) => [row.name, ...sides(row), word(row.after[3])]);
  return figure(dumbbell(title, rows), table(caption, head, cells));
}

function paraphrase({ prompts, worst, back, by_kind: kinds, ...found }) {
  if (!prompts.length) return [];
  const shade = (accuracy) =>
    h(
      "td",
      { class: "n heat", style: `--share:${valueOf(accuracy) ?? 0}` },
      [plain(valueOf(accuracy)), " ", h("small", interval(accuracy))],
    );
  const line = (prompt) =>
    h(
      "tr",
      h(
        "th",
        { scope: "row" },
        proper(prompt.text),
        back.includes(prompt.text) && [" ", h("span", { class: "tag" }, "comes back")],
        prompt.seen && [" ", h("small", "forgotten by this text")],
      ),
      shade(prompt.before),
      shade(prompt.after),
    );
  const bodies = [...new Set(prompts.map(({ kind }) => kind))].map((kind) => {
    const { mean_before: before, mean_after: after } = kinds[kind];
    const means = [before, after].map((mean) => h("td", { class: "n" }, plain(mean)));
    const own = prompts
      .filter((prompt) => prompt.kind === kind)
      .sort((one, other) => (valueOf(other.after) ?? -1) - (valueOf(one.after) ?? -1));
    const head = h("tr", { class: "group" }, h("th", { scope: "rowgroup" }, kind), means);
    return h("tbody", head, own.map(line));
  });
  return [
    h(
      "p",
      `${prompts.length} texts; under those that forgetting did not see, ${percent(found.mean_before)} of its images are found before and ${percent(found.mean_after)} after, on average.`,
      worst && [
        " Worst: ",
        h("q", { class: "name" }, worst.text),
        ` (${worst.kind}), ${percent(valueOf(worst.after))}.`,
      ],
    ),
    grid(
      "Accuracy by text",
      "Accuracy on the class by the text that names it, percent; by kind of text, with the kind's mean",
      ["Text, by kind", "Before, %#", "After, %#"],
      bodies,
      "scroll tall",
    ),
  ];
}

function destinations(found, { name }) {
  const [before, after] = ["before", "after"].map(
    (side) => new Map(found[side].map((one) => [one.name, one.share])),
  );
  const rest = after.size < 10 ? 0 : null; // a full list may have left some out
  const own = before.has(name) || after.has(name) ? [name] : [];
  const rows = [...new Set([...own, ...after.keys()])].map((other) => ({
    name: other === name ? `${name} (itself)` : other,
    before: before.get(other) ?? null,
    after: after.get(other) ?? rest,
  }));
  const key = (side, swatch) => h("li", h("span", { class: `swatch ${swatch}-key` }), ` ${side}`);
  return [
    rows.length && [
      h(
        "p",
        `What its ${found.images} images are taken for. Spread: ${fixed(found.entropy_bits_before, 1)} bits before, ${fixed(found.entropy_bits_after, 1)} bits after.`,
      ),
      h("ul", { class: "legend" }, key("after", "bar"), key("before", "tick")),
      figure(
        bars("Share of the class's images by predicted class, percent", rows),
        table(
          "Predicted classes of its images",
          ["Predicted class", "Before, %#", "After, %#"],
          rows.map((one) => [one.name, plain(one.before), plain(one.after)]),
        ),
      ),
    ],
    found.leak.length && [
      h(
        "p",
        "How well the model's scores still tell its images from those of the classes that they are now taken for (area under the curve; 0.5 is chance, 1 is always):",
      ),
      table(
        "Area under the curve",
        ["Told apart from", "Images#", "Before#", "After#"],
        found.leak.map((one) => [
          one.name,
          word(one.images),
          fixed(one.auc_before, 2),
          fixed(one.auc_after, 2),
        ]),
      ),
    ],
  ];
}

function neighbours({ classes, moved, ...found }) {
  const title = "Nearest retained classes";
  return [
    classes.length && [
      h(
        "p",
        `The ${classes.length} retained classes with the most similar texts: ${percent(found.mean_before)} before, ${percent(found.mean_after)} after.`,
      ),
      beforeAfter(),
      compared(`${title}, accuracy before and after`, title, "Class", classes),
    ],
    h(
      "p",
      `${moved.count.toLocaleString("en")} retained texts moved to a cosine of ${fixed(moved.mean_cosine, 4)} with where they were, on average. ${percent(moved.nearest_kept)} keep their nearest neighbour; of their ten nearest, ${percent(moved.top10_overlap)} stay.`,
    ),
    moved.worst.length &&
      h(
        "details",
        h("summary", "Texts that moved most"),
        table(
          "Texts that moved most",
          ["Text", "From", "Cosine#", "Nearest before", "Its rank now#"],
          moved.worst.map((row) => [
            row.text,
            row.group,
            fixed(row.cosine, 3),
            row.nearest_before,
            word(row.rank_after),
          ]),
        ),
      ),
  ];
}

function residue({ zero_shot: zeroShot, linear_probe: probe, nearest_neighbours: nearest }) {
  const rows = changed([
    { ...zeroShot, name: "Zero-shot" },
    { ...probe, name: "Linear probe" },
    { ...nearest, name: `${nearest.k} nearest` },
  ]);
  if (!rows.length) return [];
  const title = "What images still tell";
  return [
    h(
      "p",
      "Forgetting changes texts only. What was learnt from image embeddings alone, a probe or a search, finds the class as before",
      probe.auc === null ? "." : `: area under the probe's curve ${fixed(probe.auc, 3)}.`,
    ),
    beforeAfter(),
    compared(`${title}, accuracy on the class`, title, "By", rows),
  ];
}

function retrieval(found) {
  const chart = (way, title) => {
    const rows = ["forgotten", "retained"].flatMap((who) =>
      Object.keys(found[way][who].after).map((k) => ({
        name: `${who}, top ${k}`,
        before: found[way][who].before[k],
        after: found[way][who].after[k],
      })),
    );
    const known = changed(rows);
    return known.length ? [h("h5", title), compared(title, title, "Found among", known)] : [];
  };
  const charts = [
    ...chart("image_to_text", "Texts searched by an image"),
    ...chart("text_to_image", "Images searched by a text"),
  ];
  if (!charts.length) return [];
  return [
    h(
      "p",
      "How often the right one is the first found, or among the first five or ten, for forgotten and retained classes.",
    ),
    beforeAfter(),
    ...charts,
  ];
}

function confusion({ names, ...found }) {
  const columns = [...names, "any other"];
  const side = (key, title) => {
    const words = `Confusion ${key} forgetting`;
    const head = ["True class", ...columns.map((name) => `${name}#`)];
    const rows = names.map((name, row) => [name, ...found[key][row].map(word)]);
    const numbers = table(`${words}, images`, head, rows);
    return h("div", h("h5", title), figure(heat(words, names, columns, found[key]), numbers));
  };
  return [
    note(
      "Rows are true classes, columns what the model says. Numbers are images, shading is the share of the row. The forgotten class is first.",
    ),
    h("div", { class: "pair" }, side("before", "Before"), side("after", "After")),
  ];
}

const SECTIONS = [
  ["paraphrase", "Other words", paraphrase],
  ["destinations", "Where its images go", destinations],
  ["neighbours", "Nearest retained classes", neighbours],
  ["residue", "What images still tell", residue],
  ["retrieval", "Retrieval", retrieval],
  ["undo", "Undoing the change", undo],
  ["relearning", "Learning it again", relearning, "whole"],
  ["confusion", "Confusion", confusion, "whole"],
];

function sections(row) {
  const measures = SECTIONS.map(([key, title, show, size]) => {
    const found = row.audit[key];
    const reasons = found?.not_measured ?? []; // a confusion has none
    const shown = [
      ...(found ? show(found, row) : []).filter(Boolean),
      ...reasons.map((reason) => note(`Not measured: ${reason}`)),
    ];
    const attributes = { class: size ?? null, "data-measure": key };
    return section(title, attributes, shown.length ? shown : note("Not measured."));
  });
  const hint = "Nothing but the logs is known of this class. To measure the rest: ";
  const none = section("Audit", { class: "whole" }, h("p", hint, h("code", row.command)));
  return [
    ...(row.audit.verdict ? measures : [none]),
    section(
      "Certificate and solver",
      { class: "whole", "data-measure": "certificate" },
      certificate(row.solver, row.facts),
    ),
  ];
}
