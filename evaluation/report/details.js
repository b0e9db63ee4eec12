// One class in detail: a section a measure. Any measure, and any part of one, may be absent.
const reasons = (found) =>
  list(found.not_measured).map((line) => h("p", { class: "note" }, `Not measured: ${line}`));
const quoted = (words) => h("q", { class: "name" }, word(words));
const BEFORE_AFTER = () => legend(["before", "before"], ["after", "after, with its 95 % interval"]);

function accuracies(caption, first, rows) {
  return table(
    caption,
    [first, "Before, %#", "95 % interval#", "After, %#", "95 % interval#", "Images#"],
    rows.map((row) => [
      row.name,
      ...cells(row.before),
      ...cells(row.after),
      word(sized(row.after) ?? sized(row.before)),
    ]),
  );
}

function confusion(found) {
  const names = list(found.names).map(word);
  if (!names.length) return [];
  const columns = [...names, "any other"];
  const sides = [
    ["before", "Before"],
    ["after", "After"],
  ].filter(([side]) => list(found[side]).length);
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
                ...columns.map((_, column) => word(number(list(found[side][row])[column]))),
              ]),
            ),
          ),
        ),
      ),
    ),
  ];
}

function neighbours(found) {
  const rows = list(found.classes)
    .map(dict)
    .map((row) => ({ ...row, name: word(row.name) }));
  const moved = dict(found.moved);
  const worst = list(moved.worst).map(dict);
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
    number(moved.count) !== null
      ? h(
          "p",
          {},
          `${moved.count.toLocaleString("en")} retained texts moved to a cosine of ${fixed(moved.mean_cosine, 4)} with where they were, on average. ${percent(moved.nearest_kept)} keep their nearest neighbour; of their ten nearest, ${percent(moved.top10_overlap)} stay.`,
        )
      : null,
    worst.length
      ? h(
          "details",
          {},
          h("summary", {}, "Texts that moved most"),
          table(
            "Texts that moved most",
            ["Text", "From", "Cosine#", "Nearest before", "Its rank now#"],
            worst.map((row) => [
              word(row.text),
              word(row.group),
              fixed(row.cosine, 3),
              word(row.nearest_before),
              word(row.rank_after),
            ]),
          ),
        )
      : null,
  ];
}

function destinations(found, row) {
  const shares = (side) =>
    new Map(
      list(found[side])
        .map(dict)
        .map((one) => [word(one.name), number(one.share)]),
    );
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
  const leak = list(found.leak).map(dict);
  return [
    rows.length
      ? h(
          "p",
          {},
          `What ${number(found.images) === null ? "its images" : `its ${found.images} images`} are taken for. Spread: ${fixed(found.entropy_bits_before, 1)} bits before, ${fixed(found.entropy_bits_after, 1)} bits after.`,
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
    leak.length
      ? h(
          "p",
          {},
          "How well the model's scores still tell its images from those of the classes that they are now taken for (area under the curve; 0.5 is chance, 1 is always):",
        )
      : null,
    leak.length
      ? table(
          "Area under the curve",
          ["Told apart from", "Images#", "Before#", "After#"],
          leak.map((one) => [
            word(one.name),
            word(one.images),
            fixed(one.auc_before, 2),
            fixed(one.auc_after, 2),
          ]),
        )
      : null,
  ];
}

function paraphrase(found) {
  const prompts = list(found.prompts).map(dict);
  if (!prompts.length) return [];
  const back = new Set(list(found.back));
  const kindOf = (prompt) => word(prompt.kind);
  const kinds = [...new Set(prompts.map((prompt) => kindOf(prompt)))];
  const shade = (accuracy) =>
    h(
      "td",
      { class: "n heat", style: `--share:${valueOf(accuracy) ?? 0}` },
      plain(valueOf(accuracy)),
      " ",
      h("small", {}, interval(accuracy)),
    );
  const worst = dict(found.worst);
  const body = kinds.map((kind) => {
    const sum = dict(dict(found.by_kind)[kind]);
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
        .filter((prompt) => kindOf(prompt) === kind)
        .sort((one, other) => (valueOf(other.after) ?? -1) - (valueOf(one.after) ?? -1))
        .map((prompt) =>
          h(
            "tr",
            {},
            h(
              "th",
              { scope: "row" },
              h("span", { class: "name" }, word(prompt.text)),
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
      worst.text
        ? [
            " Worst: ",
            quoted(worst.text),
            ` (${word(worst.kind)}), ${percent(valueOf(worst.after))}.`,
          ]
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
            const part = dict(dict(found[way])[who]);
            return {
              name: `${who}, top ${k}`,
              before: dict(part.before)[k],
              after: dict(part.after)[k],
            };
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
  const near = dict(found.nearest_neighbours);
  const parts = [
    ["Zero-shot", found.zero_shot],
    ["Linear probe", found.linear_probe],
    [near.k ? `${near.k} nearest` : "Nearest", found.nearest_neighbours],
  ];
  const rows = parts
    .map(([name, part]) => ({ name, before: dict(part).before, after: dict(part).after }))
    .filter((row) => valueOf(row.before) !== null || valueOf(row.after) !== null);
  const auc = number(dict(found.linear_probe).auc);
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
  const audit = dict(row.audit);
  const audited = Object.keys(audit).length > 0;
  const parts = audited
    ? SECTIONS.map(([key, title, show, size]) => {
        const found = dict(audit[key]);
        const shown = show(found, row).filter((part) => part !== null);
        const why = reasons(found);
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
      certificate(dict(row.solver)),
    ),
  ];
}
