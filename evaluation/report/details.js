// One class in detail: a section a measure. A measure may have been left out of the audit.
const reasons = (found) =>
  (found.not_measured ?? []).map((line) => h("p", { class: "note" }, `Not measured: ${line}`));
const quoted = (words) => h("q", { class: "name" }, words);
const BEFORE_AFTER = () => legend(["before", "before"], ["after", "after, with its 95 % interval"]);

function accuracies(caption, first, rows) {
  return table(
    caption,
    [first, "Before, %#", "95 % interval#", "After, %#", "95 % interval#", "Images#"],
    rows.map((row) => [
      row.name,
      ...cells(row.before),
      ...cells(row.after),
      word(sized(row.after)),
    ]),
  );
}

function confusion(found) {
  const { names } = found;
  const columns = [...names, "any other"];
  const sides = [
    ["before", "Before"],
    ["after", "After"],
  ];
  return [
    h(
      "p",
      { class: "note" },
      "Rows are true classes, columns what the model says. Numbers are images, shading is the share of the row. The forgotten class is first.",
    ),
    h(
      "div",
      { class: "pair" },
      sides.map(([side, title]) =>
        h(
          "div",
          {},
          h("h5", {}, title),
          figure(
            heat(`Confusion ${side} forgetting`, names, columns, found[side]),
            table(
              `Confusion ${side} forgetting, images`,
              ["True class", ...columns.map((name) => `${name}#`)],
              names.map((name, row) => [
                name,
                ...columns.map((_, column) => word(found[side][row][column])),
              ]),
            ),
          ),
        ),
      ),
    ),
  ];
}

function neighbours(found) {
  const { classes: rows, moved } = found;
  return [
    rows.length
      ? h(
          "p",
          {},
          `The ${rows.length} retained classes with the most similar texts: ${percent(found.mean_before)} before, ${percent(found.mean_after)} after.`,
        )
      : null,
    rows.length ? BEFORE_AFTER() : null,
    rows.length
      ? figure(
          dumbbell("Nearest retained classes, accuracy before and after", rows),
          accuracies("Nearest retained classes", "Class", rows),
        )
      : null,
    h(
      "p",
      {},
      `${moved.count.toLocaleString("en")} retained texts moved to a cosine of ${fixed(moved.mean_cosine, 4)} with where they were, on average. ${percent(moved.nearest_kept)} keep their nearest neighbour; of their ten nearest, ${percent(moved.top10_overlap)} stay.`,
    ),
    moved.worst.length
      ? h(
          "details",
          {},
          h("summary", {}, "Texts that moved most"),
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
        )
      : null,
  ];
}

function destinations(found, row) {
  const shares = (side) => new Map(found[side].map((one) => [one.name, one.share]));
  const [before, after] = [shares("before"), shares("after")];
  const rest = after.size < 10 ? 0 : null; // a full list may have left some out
  const names = [
    ...new Set([
      ...(before.has(row.name) || after.has(row.name) ? [row.name] : []),
      ...after.keys(),
    ]),
  ];
  const rows = names.map((name) => ({
    name: name === row.name ? `${name} (itself)` : name,
    before: before.get(name) ?? null,
    after: after.get(name) ?? rest,
  }));
  return [
    rows.length
      ? h(
          "p",
          {},
          `What its ${found.images} images are taken for. Spread: ${fixed(found.entropy_bits_before, 1)} bits before, ${fixed(found.entropy_bits_after, 1)} bits after.`,
        )
      : null,
    rows.length
      ? h(
          "ul",
          { class: "legend" },
          h("li", {}, h("span", { class: "swatch bar-key" }), " after"),
          h("li", {}, h("span", { class: "swatch tick-key" }), " before"),
        )
      : null,
    rows.length
      ? figure(
          bars("Share of the class's images by predicted class, percent", rows),
          table(
            "Predicted classes of its images",
            ["Predicted class", "Before, %#", "After, %#"],
            rows.map((one) => [one.name, plain(one.before), plain(one.after)]),
          ),
        )
      : null,
    found.leak.length
      ? h(
          "p",
          {},
          "How well the model's scores still tell its images from those of the classes that they are now taken for (area under the curve; 0.5 is chance, 1 is always):",
        )
      : null,
    found.leak.length
      ? table(
          "Area under the curve",
          ["Told apart from", "Images#", "Before#", "After#"],
          found.leak.map((one) => [
            one.name,
            word(one.images),
            fixed(one.auc_before, 2),
            fixed(one.auc_after, 2),
          ]),
        )
      : null,
  ];
}

function paraphrase(found) {
  const { prompts, worst } = found;
  if (!prompts.length) return [];
  const back = new Set(found.back);
  const kinds = [...new Set(prompts.map((prompt) => prompt.kind))];
  const shade = (accuracy) =>
    h(
      "td",
      { class: "n heat", style: `--share:${valueOf(accuracy) ?? 0}` },
      plain(valueOf(accuracy)),
      " ",
      h("small", {}, interval(accuracy)),
    );
  const body = kinds.map((kind) => {
    const sum = found.by_kind[kind];
    const group = h(
      "tr",
      { class: "group" },
      h("th", { scope: "rowgroup" }, kind),
      h("td", { class: "n" }, plain(sum.mean_before)),
      h("td", { class: "n" }, plain(sum.mean_after)),
    );
    return h(
      "tbody",
      {},
      group,
      prompts
        .filter((prompt) => prompt.kind === kind)
        .sort((one, other) => (valueOf(other.after) ?? -1) - (valueOf(one.after) ?? -1))
        .map((prompt) =>
          h(
            "tr",
            {},
            h(
              "th",
              { scope: "row" },
              h("span", { class: "name" }, prompt.text),
              back.has(prompt.text) ? [" ", h("span", { class: "tag" }, "comes back")] : null,
              prompt.seen ? [" ", h("small", {}, "forgotten by this text")] : null,
            ),
            shade(prompt.before),
            shade(prompt.after),
          ),
        ),
    );
  });
  return [
    h(
      "p",
      {},
      `${prompts.length} texts; under those that forgetting did not see, ${percent(found.mean_before)} of its images are found before and ${percent(found.mean_after)} after, on average.`,
      worst
        ? [" Worst: ", quoted(worst.text), ` (${worst.kind}), ${percent(valueOf(worst.after))}.`]
        : null,
    ),
    h(
      "div",
      { class: "scroll tall", role: "region", "aria-label": "Accuracy by text", tabindex: "0" },
      h(
        "table",
        {},
        h(
          "caption",
          { class: "hide" },
          "Accuracy on the class by the text that names it, percent; by kind of text, with the kind's mean",
        ),
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, "Text, by kind"),
            h("th", { scope: "col", class: "n" }, "Before, %"),
            h("th", { scope: "col", class: "n" }, "After, %"),
          ),
        ),
        body,
      ),
    ),
  ];
}

function retrieval(found) {
  const ways = [
    ["image_to_text", "Texts searched by an image"],
    ["text_to_image", "Images searched by a text"],
  ];
  const charts = ways
    .map(([way, title]) => {
      const rows = ["forgotten", "retained"]
        .flatMap((who) =>
          ["1", "5", "10"].map((k) => {
            const { before, after } = found[way][who];
            return { name: `${who}, top ${k}`, before: before[k], after: after[k] };
          }),
        )
        .filter((row) => valueOf(row.before) !== null || valueOf(row.after) !== null);
      return rows.length
        ? [
            h("h5", {}, title),
            figure(dumbbell(title, rows), accuracies(title, "Found among", rows)),
          ]
        : null;
    })
    .filter(Boolean);
  return charts.length
    ? [
        h(
          "p",
          {},
          "How often the right one is the first found, or among the first five or ten, for forgotten and retained classes.",
        ),
        BEFORE_AFTER(),
        ...charts.flat(),
      ]
    : [];
}

function residue(found) {
  const parts = [
    ["Zero-shot", found.zero_shot],
    ["Linear probe", found.linear_probe],
    [`${found.nearest_neighbours.k} nearest`, found.nearest_neighbours],
  ];
  const rows = parts
    .map(([name, { before, after }]) => ({ name, before, after }))
    .filter((row) => valueOf(row.before) !== null || valueOf(row.after) !== null);
  const { auc } = found.linear_probe;
  return rows.length
    ? [
        h(
          "p",
          {},
          "Forgetting changes texts only. What was learnt from image embeddings alone, a probe or a search, finds the class as before",
          auc === null ? "." : `: area under the probe's curve ${fixed(auc, 3)}.`,
        ),
        BEFORE_AFTER(),
        figure(
          dumbbell("What images still tell, accuracy on the class", rows),
          accuracies("What images still tell", "By", rows),
        ),
      ]
    : [];
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
  const parts = row.audit.verdict
    ? SECTIONS.map(([key, title, show, size]) => {
        const found = row.audit[key];
        const shown = found ? show(found, row).filter((part) => part !== null) : [];
        const why = found ? reasons(found) : [];
        const nothing =
          shown.length || why.length ? null : h("p", { class: "note" }, "Not measured.");
        return h(
          "section",
          { class: size || null, "data-measure": key },
          h("h4", {}, title),
          shown,
          why,
          nothing,
        );
      })
    : [
        h(
          "section",
          { class: "whole" },
          h("h4", {}, "Audit"),
          h(
            "p",
            {},
            "Nothing but the logs is known of this class. To measure the rest: ",
            h("code", {}, row.command),
          ),
        ),
      ];
  return [
    ...parts,
    h(
      "section",
      { class: "whole", "data-measure": "certificate" },
      h("h4", {}, "Certificate and solver"),
      certificate(row.solver),
    ),
  ];
}
