// The pages of `ckptkit diff`, `check` and `verify`: the verdict first, in words and color, then what it comes from.
"use strict";

(() => {
  const { el, count, countOf, figure, main, size, short, whole } = Page;
  const words = (name) => (name || "").replace(/_/g, " ");
  const shapeText = (shape) => (shape.length ? shape.map((n) => (n < 0 ? "?" : n)).join(" \u00d7 ") : "scalar");
  const numel = (shape) => shape.reduce((product, n) => product * Number(n), 1);
  const badge = (text, tone) => el("span", { class: `badge ${tone || ""}` }, text);
  const SEVERITIES = ["error", "warning", "info"];

  function severities(found) {
    return SEVERITIES.map((each) => [found.filter((one) => one.severity === each).length, each])
      .filter(([number]) => number).map(([number, each]) => (each === "info" ? `${count(number)} info` : countOf(number, each))).join(", ");
  }
  const most severeFirst = (found) => [...found].sort((a, b) => SEVERITIES.indexOf(a.severity) - SEVERITIES.indexOf(b.severity));

  // What it came to: tone "good", "error" or "warning".
  function verdict(tone, word, sentence) {
    main.append(el("div", { class: `verdict ${tone}` },
      el("span", { class: "mark", "aria-hidden": "true" }, { good: "\u2713", error: "\u2717", warning: "!" }[tone]),
      el("h1", {}, word), el("p", {}, sentence)));
  }
  function figures(pairs) {
    main.append(el("dl", { class: "figures" }, pairs.filter(Boolean).map(([label, value, note]) =>
      el("div", {}, el("dt", {}, label), el("dd", {}, value, " ", note && el("small", {}, note))))));
  }
  const meter = (share, text, tone) => el("span", {}, text, el("span", { class: "meter", "aria-hidden": "true" },
    el("i", { style: { width: `${Math.min(100, 100 * share)}%`, background: tone ? `var(--${tone})` : "" } })));
  const percent = (share) => (share === null || share === undefined ? "" : share >= 1 ? "100 %" : share === 0 ? "0 %" : share < 0.001 ? "< 0.1 %" : `${Math.min(99.9, 100 * share).toFixed(1)} %`);
  const asText = (value) => (value === null || value === undefined ? "" : typeof value === "number" ? whole(value) : Array.isArray(value) ? value.map(asText).join(", ") : typeof value === "string" ? value : JSON.stringify(value));

  // A short table of our own words and a few values; rows: [cells, whether the row stands out].
  function plainTable(body, label, heads, rows) {
    body.append(el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": label }, el("table", { class: "compare" },
      el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, rows.map(([cells, isApart]) => el("tr", { class: isApart && "apart" }, cells.map((cell, n) => (n ? el("td", {}, cell) : el("th", { scope: "row" }, cell)))))))));
  }

  // ckptkit diff

  function diff(told) {
    document.title = `${told.ok ? "Same" : "Different"} \u2013 ckptkit diff`;
    const rows = told.rows, total = rows.names.length;
    const status = (i) => told.statuses[rows.statusOf[i]];
    const kind = (i) => rows.kinds[rows.kindOf[i]];
    const number = (i, n) => (rows.figures[i] ? rows.figures[i][n] : null);
    const counts = told.statuses.map((each, n) => [each, rows.statusOf.reduce((sum, one) => sum + (one === n), 0)]).filter(([, each]) => each);
    verdict(told.ok ? "good" : "error", told.ok ? "The same" : "Different", `${told.summary[0].toUpperCase()}${told.summary.slice(1)}.`);
    figures([...counts.map(([each, n]) => [each, count(n)]), ["bit-identical", count(told.unchanged), `of ${count(told.tensors)}`]]);

    const sides = Page.part("The two files", { id: "files" });
    const file = (label, of) => [[label, of(told.a), of(told.b)], of(told.a) !== of(told.b)];
    plainTable(sides, "The two files", ["what", "A", "B"], [
      [["path", told.a.path, told.b.path], false],
      file("container", (each) => each.format), file("kind", (each) => words(each.kind)), file("written by", (each) => each.writer || ""),
      file("size", (each) => size(each.size)), file("weights under", (each) => (each.section === null ? "none" : each.section || "the whole file")),
      file("tensors", (each) => count(each.tensors)), file("bytes of weights", (each) => size(each.nbytes)),
      file("saved on", (each) => each.locations.join(", ")), file("trust", (each) => words(each.trust)),
    ]);
    if (told.findings.length) Page.findings(Page.part("Findings", { note: severities(told.findings) }), most severeFirst(told.findings), told.meanings);
    if (total) differing(told, { total, status, kind, number });
    besides(told);
  }

  // How far a tensor or a module is from what it was, as a share of its norm.
  const AMOUNTS = [[1e-3, "info", "changed by under 0.1 %"], [0.1, "warning", "by under 10 %"], [Infinity, "error", "by 10 % or more, NaN or Inf"]];
  const amount = (share) => AMOUNTS.find(([most]) => share < most) || AMOUNTS[2];
  const ELSE = "soft";

  function differing(told, { total, status, kind, number }) {
    const rows = told.rows;
    // Where NaN or Inf came or went no share tells how far it is.  Where a was all zeros there is no share: what is not there any more has changed as much as it can.
    const notFinite = new Set(rows.notFinite);
    const share = (i) => { if (notFinite.has(i)) return Infinity; const own = number(i, 2); return typeof own === "number" ? own : number(i, 0) > 0 ? 1 : null; };
    const size1 = (i) => { const shape = kind(i)[3] || kind(i)[2]; return shape ? Math.max(1, numel(shape)) : 0; };
    const mean = (sums) => (sums[3] ? sums[2] / sums[3] : null);
    const toneOf = (value) => (value === null ? ELSE : amount(value)[1]);
    const by = (sums) => (mean(sums) === null ? "" : mean(sums) === Infinity ? ", NaN or Inf" : `, by ${portion(mean(sums))}`);
    const places = new Map(told.modules.map((each) => [each.module, [0, 0]]));
    for (let i = 0; i < total; i++) {
      if (share(i) === null) continue;
      const names = rows.names[i].split(".");
      for (let n = 0; n <= names.length; n++) {
        const sums = places.get(names.slice(0, n).join("."));
        if (sums) { sums[0] += share(i) * size1(i); sums[1] += size1(i); }
      }
    }
    const moved = (each) => { const [sum, weight] = places.get(each.module); return weight ? sum / weight : null; };

    let table;
    const map = Page.part("Where it changed", { note: "each tile is a tensor that differs; its color shows by how much" });
    Page.treemap(map, {
      label: "Treemap of tensors that differ, by module", rootName: "all that differs", total, path: (i) => rows.names[i].split("."),
      measures: [
        { name: "Tensors", of: () => 1, show: (n, sums) => (n === 1 && by(sums).slice(2)) || `${countOf(n, "tensor")}${by(sums)}` },
        { name: "Elements", of: size1, show: (n, sums) => (n ? `${short(n)} element${n === 1 ? "" : "s"}${by(sums)}` : countOf(sums[0], "tensor")) },
        { of: (i) => (share(i) === null ? 0 : share(i) * size1(i)) }, { of: (i) => (share(i) === null ? 0 : size1(i)) },
      ],
      tone: (sums) => toneOf(mean(sums)), leaf: (i) => { document.getElementById("tensors").scrollIntoView(); table.reveal(i); },
    });
    map.append(el("ul", { class: "legend" }, AMOUNTS.map(([, tone, text]) => el("li", { class: tone }, el("i", { "aria-hidden": "true" }), text)),
      el("li", {}, el("i", { "aria-hidden": "true" }), "added, removed, renamed or not comparable")));

    const modules = told.modules;
    if (modules.length) {
      const body = Page.part("By module", { note: "press Enter or click a row to see its tensors" });
      Page.table(body, {
        label: "Modules that differ", thing: "module", total: modules.length, height: 360, search: modules.length > 12 && ((i) => modules[i].module),
        placeholder: "Search modules", open: (i) => { document.getElementById("tensors").scrollIntoView(); table.find(modules[i].module); table.focus(); },
        columns: [
          { name: "module", mono: true, show: (i) => modules[i].module || "(whole)", key: (i) => modules[i].module },
          { name: "tensors that differ", width: 200, number: true, show: (i) => meter(modules[i].differing / modules[i].tensors, `${count(modules[i].differing)} of ${count(modules[i].tensors)}`), key: (i) => modules[i].differing },
          { name: "what", width: 220, show: (i) => Object.entries(modules[i].statuses).map(([each, n]) => `${count(n)} ${each}`).join(", "), key: (i) => Object.keys(modules[i].statuses).join() },
          { name: "changed by", width: 170, number: true, hint: "norm of the difference as a share of the norm in A, mean over the elements", show: (i) => (moved(modules[i]) === null ? "" : meter(scale(moved(modules[i])), portion(moved(modules[i])), toneOf(moved(modules[i])))), key: (i) => moved(modules[i]) },
          { name: "max |b\u2212a|", width: 110, number: true, show: (i) => figure(modules[i].max_abs), key: (i) => modules[i].max_abs },
        ],
      });
    }
    table = tensors(told, { total, status, kind, number, share, toneOf });
  }
  // From 1e-7 of the norm to all of it, in steps of ten: a change of a thousandth is to be seen beside one of all.
  const scale = (share) => (share > 0 ? Math.max(0.02, Math.min(1, 1 + Math.log10(share) / 7)) : 0);
  const portion = (share) => (share === Infinity ? "NaN or Inf" : share === 0 ? "0 %" : share < 1e-4 ? `${(100 * share).toExponential(1)} %` : `${Number((100 * share).toPrecision(3))} %`);

  function tensors(told, { total, status, kind, number, share, toneOf }) {
    const rows = told.rows;
    const TONES = { changed: "warning", recast: "info", reshaped: "error", renamed: "info", added: "good", removed: "error", "not compared": "error", "other value": "warning" };
    const both = (one, other, text) => (one === null ? "" : other === null ? text(one) : `${text(one)} \u2192 ${text(other)}`);
    const dtype = (i) => both(kind(i)[0], kind(i)[1], String), shape = (i) => both(kind(i)[2], kind(i)[3], shapeText);
    const body = Page.part("Tensors", { id: "tensors", note: "press Enter or click a row for details" });
    const detail = el("div", { "aria-live": "polite" });
    const close = () => detail.replaceChildren();
    const table = Page.table(body, {
      label: "Tensors that differ", thing: "tensor", total, close,
      search: (i) => (i in rows.was ? `${rows.names[i]} ${rows.was[i]}` : rows.names[i]),
      filters: [{ label: "what", value: status }, { label: "dtype", value: dtype }],
      open: (i) => {
        const pairs = [["what", status(i)], ["was named", rows.was[i]], ["dtype", dtype(i)], ["shape", shape(i)], ["max |b\u2212a|", number(i, 0)], ["mean |b\u2212a|", number(i, 1)],
          ["|b\u2212a| / |a|", number(i, 2)], ["cosine", number(i, 3)], ["elements that are equal", percent(number(i, 4))], ["note", rows.notes[i]]];
        detail.replaceChildren(el("div", { class: "detail", role: "region", "aria-label": `Tensor ${Page.cut(rows.names[i], 200)}` },
          el("header", {}, el("h3", {}, rows.names[i]), el("button", { type: "button", class: "quiet", onclick: () => { close(); table.focus(); } }, "Close")),
          Page.facts(pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([label, value]) => [label, asText(value)]))));
      },
      columns: [
        { name: "tensor", mono: true, show: (i) => (i in rows.was ? `${rows.names[i]} (was ${rows.was[i]})` : rows.names[i] || "(no name)"), key: (i) => rows.names[i] },
        { name: "what", width: 130, show: (i) => badge(status(i), TONES[status(i)]), key: (i) => rows.statusOf[i] },
        { name: "dtype", width: rows.kinds.some((each) => each[1]) ? 180 : 110, show: dtype, key: dtype },
        { name: "shape", width: 170, number: true, show: shape, key: (i) => (kind(i)[2] ? numel(kind(i)[2]) : null), hint: "sorted by the number of elements" },
        { name: "max |b\u2212a|", width: 120, number: true, show: (i) => figure(number(i, 0)), key: (i) => number(i, 0) },
        { name: "mean |b\u2212a|", width: 120, number: true, show: (i) => figure(number(i, 1)), key: (i) => number(i, 1) },
        { name: "changed by", width: 170, number: true, hint: "norm of the difference as a share of the norm in A", show: (i) => (share(i) === null ? "" : meter(scale(share(i)), portion(share(i)), toneOf(share(i)))), key: share },
        { name: "equal", width: 80, number: true, hint: "share of the elements that are the same", show: (i) => percent(number(i, 4)), key: (i) => number(i, 4) },
      ],
    });
    body.append(detail);
    return table;
  }

  function besides(told) {
    const beside = [...told.training.map((each) => ["training state", each]), ...told.metadata.map((each) => ["metadata", each])];
    if (beside.length) {
      const body = Page.part("Training state and metadata", { id: "training", note: countOf(beside.length, "value") });
      Page.table(body, {
        label: "Values that differ", thing: "value", total: beside.length, height: 330, search: beside.length > 12 && ((i) => beside[i][1].key), placeholder: "Search names",
        filters: [{ label: "of", value: (i) => beside[i][0] }],
        columns: [{ name: "name", mono: true, show: (i) => beside[i][1].key, key: (i) => beside[i][1].key }, { name: "of", width: 130, show: (i) => beside[i][0] },
          { name: "A", width: 260, show: (i) => asText(beside[i][1].a) }, { name: "B", width: 260, show: (i) => asText(beside[i][1].b) }],
      });
    }
    if (told.sections.length) {
      const rows = told.sections, body = Page.part("Other parts of the files", { id: "parts", note: countOf(rows.length, "part") });
      plainTable(body, "Other parts of the files", ["part", "kind", "tensors in A", "tensors in B", "result"], rows.map((each) => [[each.path || "(the rest)", words(each.kind), asText(each.a), asText(each.b),
        each.equal === null ? `only in ${each.a === null ? "B" : "A"}` : each.equal ? "the same" : `${countOf(each.differing, "tensor")} ${each.differing === 1 ? "differs" : "differ"}`], each.equal !== true]));
    }
    if (told.tree.length) {
      const rows = told.tree, body = Page.part("Everything else in the files", { id: "tree", note: `${countOf(told.tree_differences, "difference")}${rows.length < told.tree_differences ? `, the first ${count(rows.length)} here` : ""}` });
      Page.table(body, {
        label: "Differences in the trees", thing: "place", total: rows.length, height: 330, search: rows.length > 12 && ((i) => rows[i].path), placeholder: "Search places",
        filters: [{ label: "what", value: (i) => rows[i].what }],
        columns: [{ name: "place", mono: true, show: (i) => rows[i].path || "(whole file)", key: (i) => rows[i].path }, { name: "what", width: 90, show: (i) => rows[i].what },
          { name: "A", width: 240, show: (i) => asText(rows[i].a) }, { name: "B", width: 240, show: (i) => asText(rows[i].b) }, { name: "max |b\u2212a|", width: 110, number: true, show: (i) => figure(rows[i].max_abs), key: (i) => rows[i].max_abs }],
      });
    }
    if (told.ties.length)
      plainTable(Page.part("Ties", { note: "names that are tied in only one file" }), "Ties", ["names", "tied in"], told.ties.map((each) => [[each.names.join(" = "), each.tied_in.toUpperCase()], false]));
  }

  // ckptkit check

  const STATES = [["failed", "error"], ["not checked", "warning"], ["passed", "good"]];

  function check(told) {
    const total = told.paths.length, byState = STATES.map((_, n) => told.states.reduce((sum, each) => sum + (each === n), 0));
    const tone = ["good", "error", byState[0] ? "error" : "warning"][told.exit_code];
    const word = ["Passed", "Failed", byState[0] ? "Failed, and some files could not be checked" : total ? "Some files could not be checked" : "Nothing was checked"][told.exit_code];
    document.title = `${word} \u2013 ckptkit check`;
    verdict(tone, word, `${told.verdict[0].toUpperCase()}${told.verdict.slice(1)}.`);
    figures([["files", count(total)], ["passed", count(byState[2])], byState[0] && ["failed", count(byState[0])], byState[1] && ["not checked", count(byState[1])], ["findings", count(told.findings.length)]]);
    const facts = [["manifest", told.manifest], ["policy", told.config], ["share of the files", told.part], ["other files", told.passed_over]].filter(([, value]) => value);
    if (facts.length) main.append(Page.facts(facts));
    const placeOf = new Map(told.paths.map((path, i) => [path, i])), of = new Map();
    for (const each of told.findings) {
      if (!of.has(each.path)) of.set(each.path, []);
      of.get(each.path).push(each);
    }
    const rules = [...new Set([...told.ruleSets.flat(), ...told.findings.map((each) => each.rule)])];
    const held = told.ruleSets.map((set) => new Set(set));
    const GRAVITY = ["failed", "not checked", "warning", "note", "ok", ""];
    const toneOf = { failed: "error", "not checked": "warning", warning: "warning", note: "info", ok: "good" };
    const outcome = (i, rule) => {
      const found = (of.get(told.paths[i]) || []).find((each) => each.rule === rule); // the most severe is the first
      if (!found) return held[told.ruleSetOf[i]].has(rule) ? "ok" : "";
      return found.severity === "error" ? (told.unchecked.includes(found.code) ? "not checked" : "failed") : found.severity === "warning" ? "warning" : "note";
    };
    const sums = rules.map((rule) => {
      const counted = {};
      for (let i = 0; i < total; i++) { const each = outcome(i, rule); counted[each] = (counted[each] || 0) + 1; }
      return counted;
    });
    const shownOf = (each) => ({ severity: each.severity, code: each.code, message: each.message, fix: each.fix,
      told: [["rule", each.rule], ["expected", asText(each.expected)], ["found", asText(each.found)]].filter(([, value]) => value !== "") });
    if (rules.length > 0) {
      const body = Page.part("Rules", { note: countOf(rules.length, "rule") });
      Page.table(body, {
        label: "Rules", thing: "rule", total: rules.length, height: 330, columns: [
          { name: "rule", mono: true, show: (n) => rules[n], key: (n) => rules[n] },
          ...GRAVITY.slice(0, 5).filter((each) => sums.some((counted) => counted[each])).map((each) => ({ name: each === "ok" ? "passed" : each, width: 130, number: true, show: (n) => (sums[n][each] ? badge(count(sums[n][each]), toneOf[each]) : ""), key: (n) => sums[n][each] || 0 })),
        ],
      });
    }
    if (total) {
      const body = Page.part("Files", { note: "press Enter or click a row to see what was found" });
      const detail = el("div", { "aria-live": "polite" });
      const close = () => detail.replaceChildren();
      const table = Page.table(body, {
        label: "Files and rules", thing: "file", total, close, search: (i) => told.paths[i], placeholder: "Search: part of a path, or a pattern such as *.pth",
        filters: [{ label: "verdict", value: (i) => STATES[told.states[i]][0] },
          { label: "breaks rule", value: (i) => { const found = (of.get(told.paths[i]) || [])[0]; return found && found.severity !== "info" ? found.rule : ""; } }],
        open: (i) => {
          const inside = el("div", { class: "detail", role: "region", "aria-label": `File ${Page.cut(told.paths[i], 200)}` },
            el("header", {}, el("h3", {}, told.paths[i]), el("button", { type: "button", class: "quiet", onclick: () => { close(); table.focus(); } }, "Close")),
            Page.facts([["verdict", STATES[told.states[i]][0]], ["size", told.sizes[i] === null ? "" : `${size(told.sizes[i])} (${count(told.sizes[i])} bytes)`], ["SHA-256", told.digests[i] || ""], ["rules", told.ruleSets[told.ruleSetOf[i]].join(", ")]].filter(([, value]) => value)));
          Page.findings(inside, (of.get(told.paths[i]) || []).map(shownOf), told.meanings);
          detail.replaceChildren(inside);
        },
        columns: [
          { name: "file", mono: true, show: (i) => told.paths[i], key: (i) => told.paths[i] },
          { name: "verdict", width: 140, show: (i) => badge(...STATES[told.states[i]]), key: (i) => told.states[i] },
          { name: "size", width: 90, number: true, show: (i) => (told.sizes[i] === null ? "" : size(told.sizes[i])), key: (i) => told.sizes[i] },
          ...rules.map((rule) => ({ name: rule, width: Math.max(140, 9 * rule.length + 24), show: (i) => { const each = outcome(i, rule); return each && badge(each, toneOf[each]); }, key: (i) => GRAVITY.indexOf(outcome(i, rule)) })),
        ],
      });
      body.append(detail);
    }
    if (told.findings.length) {
      const fixes = [...new Set(told.findings.map((each) => each.fix).filter(Boolean))];
      const body = Page.part("Findings", { note: severities(told.findings) });
      if (fixes.length > 1) body.append(el("details", { class: "combined" }, el("summary", {}, `All ${count(fixes.length)} fixes, one per line`), Page.copyable(fixes.slice(0, 1000).join("\n"))));
      Page.findings(body, told.findings.map((each) => ({ ...shownOf(each), where: each.path })), told.meanings);
    }
  }

  // ckptkit verify

  function verify(told) {
    document.title = `${told.ok ? "Passed" : "Failed"} \u2013 ckptkit verify`;
    const isPartial = told.findings.some((each) => each.code === "not-loaded");
    const wrong = most severeFirst(told.findings.filter((each) => each.severity !== "info" || each.fix));
    const reasons = [...new Set(wrong.filter((each) => each.severity === "error").map((each) => (told.meanings[each.code] ? told.meanings[each.code].title : each.message)))];
    verdict(told.ok ? "good" : "error", told.ok ? "Passed" : "Failed", `${told.path} against ${told.reference}${reasons.length ? `: ${reasons.slice(0, 3).join("; ")}${reasons.length > 3 ? " and more" : ""}` : ""}${isPartial ? "; it was not loaded, and nothing was computed" : ""}.`);
    const whole = told.coverage, seconds = Object.values(told.seconds).reduce((sum, each) => sum + each, 0);
    figures([["tensors of the model", count(whole.tensors), `of ${count(whole.of)}`], ["parameters", percent(whole.parameters_share)],
      told.passes > 0 && ["forward passes", count(told.passes)], ["computed in", told.dtype, `on ${told.devices.join(", ")}`], ["time", time(seconds)]]);

    const checks = told.checks, body = Page.part("Checks", { note: `${count(checks.filter((each) => each.run).length)} of ${count(checks.length)} ran` });
    const spent = new Map(told.steps.map((each) => [each.name, each.seconds]));
    const foundBy = (name) => told.findings.filter((each) => each.check === name);
    const state = (each) => (!each.run ? ["not run", ""] : each.codes.includes("not-loaded") ? ["not loaded", "warning"] : each.severity === "error" ? ["failed", "error"] : each.severity === "warning" ? ["warning", "warning"] : ["ok", "good"]);
    const most = Math.max(...checks.map((each) => spent.get(each.name) || 0), 1e-9);
    body.append(el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Checks" }, el("table", { class: "compare wide" },
      el("colgroup", {}, ["8rem", "8rem", "", "11rem"].map((width) => el("col", { style: { width } }))),
      el("thead", {}, el("tr", {}, ["check", "outcome", "result", "time"].map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, checks.map((each) => el("tr", {}, el("th", { scope: "row" }, each.name), el("td", {}, badge(...state(each))),
        el("td", {}, foundBy(each.name).map((one) => (one.severity === "info" || !told.meanings[one.code] ? one.message : told.meanings[one.code].title)).join("; ") || each.note || (each.run ? "no findings" : "")),
        el("td", { class: "number" }, each.run && spent.has(each.name) ? meter(spent.get(each.name) / most, time(spent.get(each.name))) : "")))))));

    if (wrong.length) Page.findings(Page.part("Findings", { note: severities(wrong) }), wrong.map((each) => ({ ...each, where: each.check && `check ${each.check}` })), told.meanings);
    coverage(told);
    outputs(told);
    const inputs = told.inputs ? told.inputs.tensors.map((each) => `${each.name ? `${each.name}: ` : ""}${shapeText(each.shape)} ${each.dtype}`).join(", ") : "";
    Page.part("How it was run", { id: "run" }).append(Page.facts([
      ["checkpoint", told.path], ["model", told.reference], ["inputs", inputs && `${inputs}${told.inputs.path ? ` from ${told.inputs.path}` : told.inputs.seed !== null ? `, drawn with seed ${told.inputs.seed}` : ""}`],
      ["peak memory", told.peak_memory_nbytes ? size(told.peak_memory_nbytes) : ""], ["time", Object.entries(told.seconds).map(([name, each]) => `${name} ${time(each)}`).join(", ")],
      ["versions", Object.entries(told.versions).map(([name, each]) => `${name} ${each}`).join(", ")]].filter(([, value]) => value)));
  }
  const time = (seconds) => (seconds < 0.0995 ? `${Number((1000 * seconds).toPrecision(2))} ms` : seconds < 99.5 ? `${Number(seconds.toPrecision(3))} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`);

  // Which names the file and the model have.
  function coverage(told) {
    const { tensors, of } = told.coverage;
    const rows = [...told.missing_keys.map((name) => [name, "missing", "", ""]), ...told.unexpected_keys.map((name) => [name, "unexpected", "", ""]),
      ...told.shape_mismatches.map((each) => [each.name, "another shape", shapeText(each.checkpoint), shapeText(each.reference)])];
    const body = Page.part("Names", { note: `${count(tensors)} of the model's ${countOf(of, "tensor")} match` });
    body.append(el("p", {}, `${percent(of ? tensors / of : 1)} of the names, ${percent(told.coverage.parameters_share)} of the parameters.`));
    if (!rows.length) { body.append(el("p", { class: "none" }, "Every name and every shape matches.")); return; }
    const tones = { missing: "error", unexpected: "warning", "another shape": "error" };
    Page.table(body, {
      label: "Names that do not match", thing: "name", total: rows.length, height: 420, search: (i) => rows[i][0], filters: [{ label: "what", value: (i) => rows[i][1] }],
      columns: [{ name: "tensor", mono: true, show: (i) => rows[i][0], key: (i) => rows[i][0] }, { name: "what", width: 160, show: (i) => badge(rows[i][1], tones[rows[i][1]]), key: (i) => rows[i][1] },
        { name: "in the file", width: 170, number: true, show: (i) => rows[i][2] }, { name: "in the model", width: 170, number: true, show: (i) => rows[i][3] }],
    });
  }

  // What the model computed, and what it was compared with.
  function outputs(told) {
    if (told.outputs.length) {
      const rows = told.outputs, body = Page.part("Outputs", { note: countOf(rows.length, "output") });
      Page.table(body, {
        label: "Outputs", thing: "output", total: rows.length, height: 330, search: rows.length > 12 && ((i) => rows[i].path), placeholder: "Search outputs",
        columns: [{ name: "output", mono: true, show: (i) => rows[i].path || "(the whole)", key: (i) => rows[i].path }, { name: "shape", width: 170, number: true, show: (i) => shapeText(rows[i].shape), key: (i) => numel(rows[i].shape) },
          { name: "dtype", width: 110, show: (i) => rows[i].dtype }, { name: "finite", width: 90, show: (i) => badge(rows[i].finite ? "yes" : "no", rows[i].finite ? "good" : "error"), key: (i) => Number(rows[i].finite) },
          ...["min", "max", "mean"].map((name) => ({ name, width: 110, number: true, show: (i) => figure(rows[i][name]), key: (i) => rows[i][name] }))],
      });
    }
    if (!told.compared.length) return;
    const rows = told.compared, body = Page.part("Outputs compared", { id: "compared", note: "the largest difference in an element, and what the tolerance allows" });
    const verdictOf = (row) => (row.equal ? ["bit-equal", "good"] : row.close ? ["within tolerance", "good"] : ["differs", "error"]);
    Page.table(body, {
      label: "Outputs compared", thing: "comparison", total: rows.length, height: 420, search: rows.length > 12 && ((i) => rows[i].path), placeholder: "Search outputs",
      filters: [{ label: "check", value: (i) => rows[i].check }, { label: "verdict", value: (i) => verdictOf(rows[i])[0] }],
      columns: [
        { name: "check", width: 120, show: (i) => rows[i].check, key: (i) => rows[i].check }, { name: "with", mono: true, width: 220, show: (i) => rows[i].what, key: (i) => rows[i].what },
        { name: "output", mono: true, show: (i) => rows[i].path || "(the whole)", key: (i) => rows[i].path }, { name: "verdict", width: 180, show: (i) => badge(...verdictOf(rows[i])), key: (i) => verdictOf(rows[i])[0] },
        { name: "max |difference|", width: 150, number: true, show: (i) => figure(rows[i].max_abs), key: (i) => rows[i].max_abs }, { name: "relative", width: 110, number: true, show: (i) => figure(rows[i].max_rel), key: (i) => rows[i].max_rel },
        { name: "allowed", width: 170, number: true, show: (i) => (typeof rows[i].allowed === "number" && rows[i].allowed > 0 ? meter(rows[i].max_abs / rows[i].allowed, figure(rows[i].allowed), rows[i].close ? "good" : "error") : figure(rows[i].allowed)), key: (i) => rows[i].allowed },
        { name: "why", width: 200, show: (i) => rows[i].reason || "" },
      ],
    });
  }

  for (const [name, show] of [["diff", diff], ["check", check], ["verify", verify]]) if (Page.howMany(name)) show(Page.data(name));
})();
