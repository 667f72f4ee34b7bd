// The page of `ckptkit inspect`: a list of the files where there are several, and what is in the chosen one.
"use strict";

(() => {
  const { el, count, countOf, figure, size, short, whole } = Page;
  const STATS = ["min", "max", "mean", "std", "zeros", "nan", "inf"];
  const TRUST = {
    safe: ["safe", "good", "Plain data and torch's own functions: loading it runs nothing else."],
    needs_trust: ["needs trust", "warning", "Loading it with pickle runs code from the packages it names. ckptkit runs none of it."],
    hostile: ["hostile", "error", "It names functions that run, import or open things. Do not load it with pickle."],
  };
  const VERDICTS = { dangerous: "error", unknown: "warning", allowed: "good", torch: "good" };
  const GRAVITY = ["dangerous", "unknown", "allowed", "torch"];
  const words = (name) => (name || "").replace(/_/g, " ");
  const shapeText = (shape) => (shape.length ? shape.map((n) => (n < 0 ? "?" : n)).join(" \u00d7 ") : "scalar");

  // The tensors of a file, each by its place.
  class Tensors {
    constructor(columns) {
      Object.assign(this, columns);
      this.total = this.names.length;
      this.kinds = this.kinds.map(([section, dtype, shape, stride, nbytes, location, role, form]) =>
        ({ section, dtype, shape, stride, nbytes: Number(nbytes), location, role, form, text: shapeText(shape),
          numel: Math.max(0, shape.reduce((product, n) => product * Number(n), 1)) }));
    }
    kind(i) { return this.kinds[this.kindOf[i]]; }
    stat(i, name) { return this.stats[i][STATS.indexOf(name)]; }
    isTied(i) { return i in this.tiedTo; }
    // Whether its bytes are another's too: it is tied, or is made of tensors that have rows of their own.
    isCountedElsewhere(i) { return this.isTied(i) || (i in this.values && this.kinds.length > 1); }
    path(i, hasSections) {
      const names = this.names[i].split(".");
      return hasSections ? [this.kind(i).section || "(in no section)", ...names] : names;
    }
  }

  function show(number) {
    const file = Page.data("file", number);
    document.title = `${file.path} \u2013 ckptkit`;
    const trust = TRUST[file.trust];
    const into = el("div", { class: "file", style: { display: "contents" } });
    place.replaceWith(into);
    place = into;
    Page.again();
    if (howMany > 1) Page.link("Files", "files");
    const badges = [file.format, words(file.kind), file.writer && `written by ${file.writer}`].filter(Boolean).map((text) => ({ text }));
    if (trust) badges.push({ text: trust[0], tone: trust[1], title: trust[2] });
    Page.header({ path: file.path, sentence: file.sentence, badges, figures: figures(file),
      facts: [...file.facts, ...(trust ? [["trust", trust[2]]] : [])] }, into);
    if (file.error) {
      const names = Page.part("Error", { note: file.error.type }, into);
      Page.findings(names, [{ severity: "error", code: "", message: file.error.message }], {});
    }
    if (file.findings.length) Page.findings(Page.part("Findings", { note: severities(file.findings) }, into), file.findings, file.meanings,
      file.combined_title && { ...file.combined_fix, title: file.combined_title });
    if (!file.error) contents(file, into);
    if (file.globals.length) globals(file, into);
  }

  function figures(file) {
    if (file.error) return [];
    const made = [], weights = file.state_dict, exact = (number) => Number(number.toPrecision(3)) !== number && count(number);
    if (weights) {
      made.push({ label: "parameters", value: short(weights.parameters), note: exact(weights.parameters) });
      if (weights.buffers) made.push({ label: "in buffers", value: short(weights.buffers), note: exact(weights.buffers) });
    }
    made.push({ label: "tensors", value: count(file.tensors.names.length) });
    if (weights) made.push({ label: "weights", value: size(weights.nbytes) });
    made.push({ label: "file", value: size(file.size) });
    return made;
  }

  function severities(found) {
    return ["error", "warning", "info"].map((each) => [found.filter((one) => one.severity === each).length, each])
      .filter(([number]) => number).map(([number, each]) => (each === "info" ? `${number} info` : countOf(number, each))).join(", ");
  }

  function contents(file, into) {
    const tensors = new Tensors(file.tensors);
    const sections = file.sections.filter((section) => section.path || file.sections.length > 1);
    const hasSections = new Set(tensors.kinds.map((kind) => kind.section)).size > 1;
    if (sections.length) sectionTable(file.sections, into);
    if (!tensors.total) { training(file, into); return; }
    let table;
    const modules = new Map(Object.entries(file.modules));
    const reveal = (i) => { document.getElementById("tensors").scrollIntoView(); table.reveal(i); };
    const map = Page.part("Where the bytes are", {}, into);
    Page.treemap(map, {
      label: "Treemap of bytes and parameters by module", rootName: "all tensors", total: tensors.total,
      path: (i) => tensors.path(i, hasSections),
      measures: [
        { name: "Bytes", of: (i) => (tensors.isCountedElsewhere(i) ? 0 : tensors.kind(i).nbytes), show: size },
        { name: "Parameters", of: (i) => (tensors.isTied(i) || tensors.kind(i).role !== "parameter" ? 0 : tensors.kind(i).numel), show: (n) => `${short(n)} parameter${n === 1 ? "" : "s"}` },
      ],
      about: (names) => modules.get((hasSections ? names.slice(1) : names).join(".")), leaf: reveal,
    });
    if (tensors.stats) spread(tensors, hasSections, into, reveal);
    table = tensorTable(file, tensors, hasSections, into);
    training(file, into);
  }

  function sectionTable(sections, into) {
    const body = Page.part("Sections", { note: countOf(sections.length, "section") }, into);
    Page.table(body, {
      label: "Sections", thing: "section", total: sections.length, height: 330,
      search: sections.length > 12 && ((i) => sections[i].path), placeholder: "Search sections",
      columns: [
        { name: "section", mono: true, show: (i) => sections[i].path || "(whole file)", key: (i) => sections[i].path },
        { name: "kind", width: 130, show: (i) => words(sections[i].kind) + (sections[i].selected ? " \u2713" : ""), key: (i) => sections[i].kind, hint: "\u2713: the weights that commands use" },
        { name: "tensors", width: 90, number: true, show: (i) => count(sections[i].tensors), key: (i) => sections[i].tensors },
        { name: "parameters", width: 130, number: true, show: (i) => (sections[i].parameters === null ? "" : count(sections[i].parameters)), key: (i) => sections[i].parameters },
        { name: "buffers", width: 100, number: true, show: (i) => (sections[i].buffers === null ? "" : count(sections[i].buffers)), key: (i) => sections[i].buffers },
        { name: "bytes", width: 100, number: true, show: (i) => size(sections[i].nbytes), key: (i) => sections[i].nbytes },
        { name: "share", width: 160, number: true, show: (i) => meter(sections[i].share), key: (i) => sections[i].share },
      ],
    });
  }
  const meter = (share) => el("span", {}, `${(100 * share).toFixed(1)} %`, el("span", { class: "meter", "aria-hidden": "true" }, el("i", { style: { width: `${Math.min(100, 100 * share)}%` } })));

  function tensorTable(file, tensors, hasSections, into) {
    const body = Page.part("Tensors", { id: "tensors", note: "press Enter or click a row for details" }, into);
    const columns = [{ name: "tensor", mono: true, width: 300, show: (i) => tensors.names[i] || "(no name)", key: (i) => tensors.names[i] }];
    if (hasSections) columns.push({ name: "section", mono: true, width: 130, show: (i) => tensors.kind(i).section || "", key: (i) => tensors.kind(i).section });
    columns.push(
      { name: "dtype", width: 92, show: (i) => tensors.kind(i).dtype, key: (i) => tensors.kind(i).dtype },
      { name: "shape", width: 150, number: true, show: (i) => tensors.kind(i).text, key: (i) => tensors.kind(i).numel, hint: "sorted by the number of elements" },
      { name: "bytes", width: 84, number: true, show: (i) => size(tensors.kind(i).nbytes), key: (i) => tensors.kind(i).nbytes });
    if (tensors.stats)
      for (const name of STATS)
        columns.push({ name: { nan: "NaN", inf: "Inf" }[name] || name, width: { zeros: 84, nan: 66, inf: 66 }[name] || 104, number: true,
          show: (i) => { const value = tensors.stat(i, name); return figure(value === null ? value : Number(value)); }, key: (i) => { const value = tensors.stat(i, name); return value === null ? null : Number(value); },
          bad: name === "nan" || name === "inf" ? (i) => tensors.stat(i, name) > 0 : null });
    else columns.push({ name: "role", width: 100, show: (i) => (tensors.isTied(i) ? "tied" : tensors.kind(i).form || (tensors.kind(i).role === "unknown" ? "" : tensors.kind(i).role)), key: (i) => tensors.kind(i).role });
    columns[0].width = undefined;
    const detail = el("div", { "aria-live": "polite" });
    const close = () => detail.replaceChildren();
    const table = Page.table(body, {
      label: "Tensors", thing: "tensor", total: tensors.total, columns, close,
      search: (i) => tensors.names[i],
      filters: [
        { label: "dtype", value: (i) => tensors.kind(i).dtype },
        { label: "section", value: (i) => tensors.kind(i).section || "" },
        { label: "role", value: (i) => (tensors.isTied(i) ? "tied" : tensors.kind(i).form || tensors.kind(i).role) },
      ],
      open: (i) => detail.replaceChildren(one(tensors, i, () => { close(); table.focus(); })),
    });
    body.append(detail);
    return table;
  }

  // All there is to say of one tensor.
  function one(tensors, i, close) {
    const kind = tensors.kind(i), name = tensors.names[i] || "(no name)";
    const told = [["dtype", kind.dtype], ["shape", kind.text], ["elements", count(kind.numel)], ["bytes", `${size(kind.nbytes)}${kind.nbytes > 999 ? ` (${count(kind.nbytes)})` : ""}`]];
    if (kind.stride.length) told.push(["stride", kind.stride.join(", ")]);
    if (kind.section) told.push(["section", kind.section]);
    if (kind.role !== "unknown") told.push(["role", kind.role]);
    if (kind.location) told.push(["saved on", kind.location]);
    if (tensors.isTied(i)) told.push(["tied to", tensors.tiedTo[i]]);
    if (kind.form) told.push(["stored as", kind.form]);
    if (tensors.values[i]) told.push(["value", tensors.values[i]]);
    if (tensors.stats) STATS.forEach((stat) => { if (tensors.stat(i, stat) !== null) told.push([{ nan: "NaN", inf: "Inf" }[stat] || stat, figure(tensors.stat(i, stat))]); });
    const right = el("div", {});
    const made = el("div", { class: "detail", role: "region", "aria-label": `Tensor ${Page.cut(name, 200)}` },
      el("header", {}, el("h3", {}, name), el("button", { type: "button", class: "quiet", onclick: close }, "Close")),
      el("div", { class: "two" }, Page.facts(told), right));
    const histogram = tensors.histograms && tensors.histograms[i];
    const finite = histogram && binsOf(histogram), least = tensors.stats && tensors.stat(i, "min");
    if (finite && least === tensors.stat(i, "max")) right.append(el("p", { class: "none" }, finite.sum === 1 ? `The only finite value is ${figure(least)}.` : `All ${count(finite.sum)} finite values are ${figure(least)}.`));
    else if (finite && finite.bins.some((bin) => Math.abs(bin.middle) > 1e300)) right.append(el("p", { class: "none" }, "There are finite values above 1e300, which are too large to draw."));
    else if (histogram) requestAnimationFrame(() => drawHistogram(right, histogram, name));
    else if (tensors.stats) right.append(el("p", { class: "none" }, kind.dtype.includes("complex") ? "Complex values have no order, and so no histogram." : "There is no finite value to draw."));
    return made;
  }

  // The bins of a histogram, [exponent, first, counts...]: {from, to, count}.
  function binsOf([exponent, first, ...counts]) {
    const width = 2 ** exponent, bins = [];
    let at = first;
    for (const number of counts) {
      if (number < 0) { at -= number; continue; }
      bins.push({ from: at * width, to: (at + 1) * width, middle: at * width + width / 2, count: number });
      at++;
    }
    return { bins, width, sum: bins.reduce((all, bin) => all + bin.count, 0) };
  }

  function drawHistogram(body, histogram, name) {
    const { bins, width, sum } = binsOf(histogram);
    const most = bins.reduce((a, b) => (b.count > a.count ? b : a));
    let isLog = most.count > 200 * (bins.map((bin) => bin.count).sort((a, b) => a - b)[Math.floor(bins.length / 2)] || 1);
    const chart = { redraw: () => {} };
    const tools = el("div", { class: "tools" }, el("strong", { class: "grow" }, "Values"),
      Page.choice("Scale of the counts", [[false, "Linear"], [true, "Log"]], isLog, (value) => { isLog = value; chart.redraw(); }));
    body.append(tools);
    Object.assign(chart, Page.chart(body, {
      label: `Histogram of the values of ${Page.cut(name, 100)}`, height: 260,
      caption: `${countOf(sum, "finite value")} in ${countOf(bins.length, "bin")} ${figure(width)} wide; most, ${count(most.count)}, from ${figure(most.from)} to ${figure(most.to)}.`,
      draw: (colors) => ({
        traces: [{ type: "bar", x: bins.map((bin) => bin.middle), y: bins.map((bin) => bin.count), width: bins.map(() => width),
          marker: { color: colors.series(0), line: { width: 0 } }, hoverinfo: "text", textposition: "none",
          hovertext: bins.map((bin) => `${figure(bin.from)} to ${figure(bin.to)}<br>${countOf(bin.count, "value")}, ${((100 * bin.count) / sum).toPrecision(3)} %`) }],
        layout: { bargap: 0.04, xaxis: { ...colors.axis, tickformat: ".4~g" }, yaxis: { ...colors.axis, type: isLog ? "log" : "linear", tickformat: "~s", dtick: isLog || most.count < 6 ? 1 : undefined, range: isLog ? [-0.3, 1.05 * Math.log10(most.count) + 0.1] : undefined } },
      }),
    }));
  }

  // How the values of tensors spread, layer by layer in file order.
  function spread(tensors, hasSections, into, reveal) {
    const groups = new Map([["matrices", "Weights of 2 dimensions or more"], ["all", "All floating tensors"]]);
    const isFloat = (i) => /^(b?float)/.test(tensors.kind(i).dtype) && !tensors.isTied(i) && tensors.stat(i, "zeros") !== null;
    const hasRoles = tensors.kinds.some((kind) => kind.role === "parameter"); // an optimizer's tensors have none
    const isWeight = (i) => tensors.kind(i).shape.length > 1 && (!hasRoles || tensors.kind(i).role === "parameter");
    const weightsOf = (group) => {
      const found = [];
      for (let i = 0; i < tensors.total; i++) if (isFloat(i) && (group === "all" || isWeight(i))) found.push(i);
      return found;
    };
    let group = weightsOf("matrices").length > 1 ? "matrices" : "all";
    let places = weightsOf(group), isLog = places.some((i) => tensors.stat(i, "std") > 0 || tensors.stat(i, "max") > 0);
    if (places.length < 2) return;
    const body = Page.part("Spread by layer", { note: "in file order" }, into);
    const chart = { redraw: () => {} };
    const sayAll = () => {
      const known = places.filter((i) => typeof tensors.stat(i, "std") === "number").sort((a, b) => tensors.stat(a, "std") - tensors.stat(b, "std"));
      const bad = places.filter((i) => tensors.stat(i, "nan") || tensors.stat(i, "inf"));
      const named = (i) => `${Page.cut(tensors.names[i], 80)} (${figure(tensors.stat(i, "std"))})`;
      return `${countOf(places.length, "tensor")}. ${known.length ? `Smallest std: ${named(known[0])}; largest: ${named(known[known.length - 1])}. ` : ""}${bad.length ? `${countOf(bad.length, "tensor")} with NaN or Inf: ${bad.slice(0, 5).map((i) => Page.cut(tensors.names[i], 80)).join(", ")}${bad.length > 5 ? " and more" : ""}.` : "No NaN, no Inf."}`;
    };
    body.append(el("div", { class: "tools" },
      el("label", { class: "grow" }, "Show", el("select", { onchange: (event) => { group = event.target.value; places = weightsOf(group); chart.redraw(); chart.say(sayAll()); } },
        [...groups].filter(([value]) => weightsOf(value).length).map(([value, text]) => el("option", { value, selected: value === group }, text)))),
      Page.choice("Scale", [[true, "Log"], [false, "Linear"]], isLog, (value) => { isLog = value; chart.redraw(); })));
    const mostPoints = 1500;
    let drawn = [];
    Object.assign(chart, Page.chart(body, {
      label: "Spread of the values of each tensor, in file order; the table of tensors has the figures", caption: sayAll(), height: 320,
      onclick: (event) => { const point = event.points[0]; if (point.data.meta) reveal(point.data.meta[point.pointNumber]); },
      draw: (colors) => {
        const step = Math.ceil(places.length / mostPoints);
        drawn = [];
        for (let from = 0; from < places.length; from += step) // of several the widest stands for all
          drawn.push(places.slice(from, from + step).reduce((a, b) => (tensors.stat(b, "std") > tensors.stat(a, "std") ? b : a)));
        const positive = (value) => (typeof value !== "number" || (isLog && value <= 0) ? null : value);
        const x = drawn.map((_, n) => n * step);
        const hover = (i) => `${Page.inert(hasSections && tensors.kind(i).section ? `${tensors.kind(i).section}: ${tensors.names[i]}` : tensors.names[i])}<br>min ${figure(tensors.stat(i, "min"))}, max ${figure(tensors.stat(i, "max"))}<br>mean ${figure(tensors.stat(i, "mean"))}, std ${figure(tensors.stat(i, "std"))}`;
        const line = (name, n, of, more) => ({ type: "scatter", mode: drawn.length > 300 ? "lines" : "lines+markers", name, x, y: drawn.map(of), meta: drawn, hoverinfo: "text+name", hovertext: drawn.map(hover),
          line: { color: colors.series(n), width: 1.6 }, marker: { size: 5 }, ...more });
        const outer = (i) => (tensors.stat(i, "max") === null ? null : Math.max(Math.abs(Number(tensors.stat(i, "min"))), Math.abs(Number(tensors.stat(i, "max")))));
        const traces = isLog
          ? [line("largest |value|", 1, (i) => positive(outer(i)), { line: { color: colors.series(1), width: 1.2, dash: "dot" } }),
            line("std", 0, (i) => positive(tensors.stat(i, "std"))),
            line("|mean|", 2, (i) => positive(tensors.stat(i, "mean") === null ? null : Math.abs(tensors.stat(i, "mean"))), { mode: "markers", marker: { size: 5, symbol: "diamond" } })]
          : [line("max", 1, (i) => positive(tensors.stat(i, "max")), { line: { color: colors.series(1), width: 1.2, dash: "dot" } }),
            line("mean", 2, (i) => positive(tensors.stat(i, "mean"))), line("std", 0, (i) => positive(tensors.stat(i, "std"))),
            line("min", 4, (i) => positive(tensors.stat(i, "min")), { line: { color: colors.series(4), width: 1.2, dash: "dot" } })];
        const bad = places.map((i, n) => [i, n]).filter(([i]) => tensors.stat(i, "nan") || tensors.stat(i, "inf")).slice(0, 500);
        if (bad.length)
          traces.push({ type: "scatter", mode: "markers", name: "NaN or Inf", x: bad.map(([, n]) => n), y: bad.map(() => 1), yaxis: "y2", cliponaxis: false, meta: bad.map(([i]) => i), hoverinfo: "text", 
            hovertext: bad.map(([i]) => `${Page.inert(tensors.names[i])}<br>${count(tensors.stat(i, "nan"))} NaN, ${count(tensors.stat(i, "inf"))} Inf`), marker: { color: colors.error, size: 9, symbol: "x" } });
        return { traces, layout: { showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: colors.soft } }, margin: { l: 56, r: 12, t: 30, b: 40 },
          xaxis: { ...colors.axis, title: { text: "tensor, in file order", font: { color: colors.soft, size: 12 } } },
          yaxis: { ...colors.axis, type: isLog ? "log" : "linear", tickformat: "~g", dtick: isLog ? 1 : undefined },
          yaxis2: { overlaying: "y", range: [0, 1.04], visible: false, fixedrange: true } } };
      },
    }));
  }

  function training(file, into) {
    const state = file.training || {}, told = [...(state.optimizers || []), ...(state.schedulers || [])];
    const pairs = Object.entries({ ...file.metadata, ...state.scalars }).filter(([key, value]) => value !== null && !told.some((each) => key.startsWith(`${each.path}.`)));
    if (!told.length && !pairs.length) return;
    const body = Page.part(told.length || Object.keys(state.scalars || {}).length ? "Training state" : "Metadata", { id: "training" }, into);
    if (told.length) {
      const rates = (lr) => { const all = [...new Set(lr.filter((rate) => rate !== null))]; return all.slice(0, 4).map(figure).join(", ") + (all.length > 4 ? ", \u2026" : ""); };
      Page.table(body, {
        label: "Optimizers and schedulers", thing: "optimizer or scheduler", total: told.length, height: 240,
        columns: [
          { name: "where", mono: true, show: (i) => told[i].path || "(whole file)" },
          { name: "what", width: 300, show: (i) => `${told[i].kind || "unknown class"}${told[i].inferred ? " (by its settings)" : ""}` },
          { name: "learning rate", width: 170, number: true, show: (i) => rates(told[i].lr) },
          { name: "steps or epoch", width: 140, number: true, show: (i) => whole("steps" in told[i] ? told[i].steps : told[i].last_epoch) },
          { name: "groups", width: 80, number: true, show: (i) => figure(told[i].groups) },
          { name: "tensors", width: 90, number: true, show: (i) => figure(told[i].tensors) },
          { name: "bytes", width: 90, number: true, show: (i) => (told[i].nbytes ? size(told[i].nbytes) : "") },
        ],
      });
    }
    const text = (value) => (typeof value === "string" ? value : typeof value === "number" ? whole(value) : JSON.stringify(value));
    if (pairs.length)
      Page.table(body, {
        label: "Values", thing: "value", total: pairs.length, height: 330, search: pairs.length > 12 && ((i) => `${pairs[i][0]} ${text(pairs[i][1])}`), placeholder: "Search names and values",
        columns: [
          { name: "name", mono: true, width: 280, show: (i) => pairs[i][0], key: (i) => pairs[i][0] },
          { name: "value", show: (i) => text(pairs[i][1]), key: (i) => (typeof pairs[i][1] === "number" ? pairs[i][1] : text(pairs[i][1])) },
        ],
      });
  }

  function globals(file, into) {
    const uses = [...file.globals].sort((a, b) => GRAVITY.indexOf(a.verdict) - GRAVITY.indexOf(b.verdict));
    const body = Page.part("Names in the pickle", { id: "names", note: "ckptkit imports none of them" }, into);
    Page.table(body, {
      label: "Names in the pickle", thing: "name", total: uses.length, height: 330, search: uses.length > 12 && ((i) => uses[i].name), placeholder: "Search names",
      filters: [{ label: "verdict", value: (i) => uses[i].verdict }],
      columns: [
        { name: "name", mono: true, show: (i) => uses[i].name, key: (i) => uses[i].name },
        { name: "verdict", width: 120, show: (i) => el("span", { class: `badge ${VERDICTS[uses[i].verdict]}` }, uses[i].verdict), key: (i) => GRAVITY.indexOf(uses[i].verdict) },
        { name: "calls", width: 100, number: true, show: (i) => count(uses[i].count), key: (i) => uses[i].count },
        { name: "where, and why", width: 420, show: (i) => [uses[i].reason, uses[i].where.join("; ")].filter(Boolean).join(" \u2013 ") },
      ],
    });
  }

  // Several files: a list to choose from.
  const howMany = Page.howMany("head");
  let place = el("div", {});
  Page.main.append(place);
  const passedOver = Page.data("passed-over");
  if (howMany > 1) {
    const heads = Array.from({ length: howMany }, (_, n) => Page.data("head", n));
    const body = Page.part("Files", { id: "files", note: [countOf(howMany, "file"), size(heads.reduce((sum, head) => sum + (head.size || 0), 0)), passedOver].filter(Boolean).join("; ") }, Page.main);
    place.before(document.getElementById("files"));
    const worst = (head) => (head.error ? "unreadable" : Object.keys(head.severities)[0] || "nothing found");
    const tone = { unreadable: "error", error: "error", warning: "warning", info: "info" };
    const list = Page.table(body, {
      label: "Files", thing: "file", total: howMany, height: 300, search: (i) => heads[i].path, placeholder: "Search: part of a path, or a pattern such as *.pth",
      filters: [{ label: "found", value: (i) => worst(heads[i]) }, { label: "kind", value: (i) => words(heads[i].kind) }, { label: "trust", value: (i) => words(heads[i].trust) }],
      open: (i) => { show(i); Page.announce(`${Page.cut(heads[i].path, 200)} is shown below`); },
      columns: [
        { name: "file", mono: true, show: (i) => heads[i].path, key: (i) => heads[i].path },
        { name: "kind", width: 120, show: (i) => words(heads[i].kind), key: (i) => heads[i].kind },
        { name: "tensors", width: 90, number: true, show: (i) => (heads[i].error ? "" : count(heads[i].tensors)), key: (i) => heads[i].tensors },
        { name: "parameters", width: 120, number: true, show: (i) => (heads[i].parameters === null ? "" : count(heads[i].parameters)), key: (i) => heads[i].parameters },
        { name: "size", width: 90, number: true, show: (i) => (heads[i].size === null ? "" : size(heads[i].size)), key: (i) => heads[i].size },
        { name: "trust", width: 135, show: (i) => (heads[i].trust ? el("span", { class: `badge ${TRUST[heads[i].trust][1]}` }, words(heads[i].trust)) : ""), key: (i) => heads[i].trust },
        { name: "found", width: 150, show: (i) => el("span", { class: `badge ${tone[worst(heads[i])] || "good"}` }, worst(heads[i])), key: (i) => worst(heads[i]) },
      ],
    });
    list.choose(0);
  } else if (howMany) {
    show(0);
    if (passedOver) Page.main.append(el("p", { class: "none" }, passedOver));
  } else Page.main.append(el("p", { class: "none" }, ["No checkpoint was found", passedOver].filter(Boolean).join("; ")));
})();
