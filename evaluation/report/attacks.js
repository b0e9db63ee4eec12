// One class in detail, continued: what somebody with images or with the weights can do, and the
// proof.
const METHODS = {
  cache: "A cache beside the text",
  probe: "A probe on image embeddings",
  refit: "A new fit of the text",
};
const KEYS = { forgotten: "after", before: "before", no_text: "no_text", control: "control" };

function relearning({ shots, words, methods, control_class: control }) {
  const panel = (title, steps, part, unit) => {
    const { needed } = part;
    const series = Object.entries(KEYS)
      .filter(([key]) => key in part)
      .map(([key, name]) => ({ name, values: part[key] }));
    return h(
      "div",
      h("h5", title),
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
  };
  const panels = Object.entries(methods).map(([name, part]) =>
    panel(METHODS[name] ?? name, shots, part, "image"),
  );
  if (words.forgotten.length)
    panels.push(panel("Texts instead of images", words.counts, words, "text"));
  if (!panels.length) return [];
  return [
    h(
      "p",
      "Accuracy on the class once somebody has a few examples of it. Compared with the model that never forgot, with one that has no text of the class, and with a class that nobody forgot",
      control === null ? "." : [" (", proper(control), ")."],
    ),
    legend(...Object.values(KEYS).map((mark) => [mark, TITLES[mark]])),
    h("div", { class: "panels" }, panels),
  ];
}

const ATTACKS = {
  original_known: "The original projection",
  two_adapters: "Two changed projections",
  alone: "The changed projection alone",
};

function undo({ names, attacks }) {
  const rows = Object.entries(attacks).map(([name, part]) => [
    ATTACKS[name] ?? name,
    part.rank === null ? DASH : `${part.rank} (${word(part.rank_expected)})`,
    fixed(part.text_cosine, 3),
    part.places.length > 1 ? part.places.join(", ") : word(part.place),
    proper(part.top.join(", ") || DASH),
  ]);
  if (!rows.length) return [];
  const head = ["Who has", "Rank (expected)#", "Cosine#", "Place#", "First guesses"];
  return [
    h(
      "p",
      `Who has the weights can look for the direction that forgetting turned. The cosine says how near they come to the forgotten text, the place which of ${names.toLocaleString("en")} names they would guess.`,
    ),
    table("Undoing the change", head, rows),
  ];
}

// `facts` are all that the logs say, as [name with dots, text].
function certificate({ gap, branch, reduction, trials, removed, left }, facts) {
  if (!facts.length) return h("p", "The logs say nothing about the solver.");
  const proof =
    gap === null
      ? "This method comes without a proof of optimality."
      : gap <= 1e-6
        ? `Proved optimal: no change of the projection can lower its objective by more than a fraction of ${gap.toExponential(1)}.`
        : `Not proved optimal: the relative gap is ${gap.toExponential(1)}.`;
  const told = (words, names) => names.length > 0 && h("p", words, proper(names.join(", ")), ".");
  return [
    h(
      "p",
      proof,
      branch === "none" && " Nothing moves: the weight of forgetting is below the threshold.",
      reduction !== null && ` The texts went ${percent(reduction)} of their way.`,
      trials > 0 && ` ${counted(trials, "trial", "trials")}.`,
    ),
    told("No longer among the names to choose from: ", removed),
    told("Left the retain set, since they mean the same: ", left),
    h(
      "dl",
      { class: "facts" },
      facts.map(([key, value]) => h("div", h("dt", key), h("dd", value))),
    ),
  ];
}
