// One class in detail, continued: what somebody with images or with the weights can do, and the
// proof.
const METHODS = {
  cache: "A cache beside the text",
  probe: "A probe on image embeddings",
  refit: "A new fit of the text",
};
const KEYS = [
  ["forgotten", "after"],
  ["before", "before"],
  ["no_text", "no_text"],
  ["control", "control"],
];

function relearning(found) {
  const { shots, words } = found;
  const panels = Object.entries(found.methods).map(([name, part]) => [
    METHODS[name] || name,
    shots,
    part,
    "image",
  ]);
  if (words.forgotten.length) panels.push(["Texts instead of images", words.counts, words, "text"]);
  if (!panels.length) return [];
  return [
    h(
      "p",
      {},
      "Accuracy on the class once somebody has a few examples of it. Compared with the model that never forgot, with one that has no text of the class, and with a class that nobody forgot",
      found.control_class
        ? [" (", h("span", { class: "name" }, found.control_class), ")."]
        : ".",
    ),
    legend(...KEYS.map(([, mark]) => [mark, TITLES[mark]])),
    h(
      "div",
      { class: "panels" },
      panels.map(([title, steps, part, unit]) => {
        const { needed } = part;
        const series = KEYS.filter(([key]) => key in part).map(([key, name]) => ({
          name,
          values: part[key],
        }));
        return h(
          "div",
          {},
          h("h5", {}, title),
          figure(
            curves(`${title}: accuracy by number of examples`, steps, series),
            table(
              title,
              ["Examples", ...series.map(({ name }) => `${TITLES[name]}, %#`)],
              steps.map((step, index) => [
                word(step),
                ...series.map(({ values }) => plain(valueOf(values[index]))),
              ]),
            ),
            needed === null
              ? "Half of its accuracy does not come back with these."
              : `${counted(needed, unit, `${unit}s`)} ${needed === 1 ? "brings" : "bring"} half of its accuracy back.`,
          ),
        );
      }),
    ),
  ];
}

const ATTACKS = {
  original_known: "The original projection",
  two_adapters: "Two changed projections",
  alone: "The changed projection alone",
};

function undo(found) {
  const attacks = Object.entries(found.attacks);
  if (!attacks.length) return [];
  return [
    h(
      "p",
      {},
      `Who has the weights can look for the direction that forgetting turned. The cosine says how near they come to the forgotten text, the place which of ${found.names.toLocaleString("en")} names they would guess.`,
    ),
    table(
      "Undoing the change",
      ["Who has", "Rank (expected)#", "Cosine#", "Place#", "First guesses"],
      attacks.map(([name, part]) => [
        ATTACKS[name] || name,
        part.rank === null ? DASH : `${part.rank} (${word(part.rank_expected)})`,
        fixed(part.text_cosine, 3),
        part.places.length > 1 ? part.places.join(", ") : word(part.place),
        h("span", { class: "name" }, part.top.join(", ") || DASH),
      ]),
    ),
  ];
}

// Nested settings as [name with dots, text]; what a method recorded may be anything.
function flat(settings, before = "") {
  const nested = (value) => value && typeof value === "object" && !Array.isArray(value);
  return Object.entries(settings).flatMap(([key, value]) =>
    nested(value) && Object.keys(value).length
      ? flat(value, `${before}${key}.`)
      : [[before + key, typeof value === "string" ? value : JSON.stringify(value)]],
  );
}

function certificate(solver) {
  const gap = solver.certificate?.gap ?? null;
  const gone = solver.left_retain_set ?? [];
  const trials = solver.trials ?? [];
  const removed = solver.removed_names ?? [];
  if (!Object.keys(solver).length) return [h("p", {}, "The logs say nothing about the solver.")];
  return [
    h(
      "p",
      {},
      gap === null
        ? "This method comes without a proof of optimality."
        : gap <= 1e-6
          ? `Proved optimal: no change of the projection can lower its objective by more than a fraction of ${gap.toExponential(1)}.`
          : `Not proved optimal: the relative gap is ${gap.toExponential(1)}.`,
      solver.branch === "none"
        ? " Nothing moves: the weight of forgetting is below the threshold."
        : "",
      typeof solver.reduction === "number"
        ? ` The texts went ${percent(solver.reduction)} of their way.`
        : "",
      trials.length ? ` ${counted(trials.length, "trial", "trials")}.` : "",
    ),
    removed.length
      ? h(
          "p",
          {},
          "No longer among the names to choose from: ",
          h("span", { class: "name" }, removed.join(", ")),
          ".",
        )
      : null,
    gone.length
      ? h(
          "p",
          {},
          "Left the retain set, since they mean the same: ",
          h("span", { class: "name" }, gone.join(", ")),
          ".",
        )
      : null,
    h(
      "dl",
      { class: "facts" },
      flat(solver)
        .filter(([key]) => !key.startsWith("left_retain_set") && key !== "trials")
        .map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, value))),
    ),
  ];
}
