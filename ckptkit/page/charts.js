// Charts, drawn by plotly.js.  It takes a few tags and references in its texts for markup: `Page.inert` makes them text.
"use strict";

Page.inert = (text) => Page.cut(String(text), 120).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// One chart: draw(colors) -> {traces, layout}; label says in words what it shows.  Drawn again where the theme changes.
Page.chart = (body, { label, caption, draw, height, onclick, isLater }) => {
  const { el, color } = Page;
  const node = el("div", { class: "chart", style: height ? { height: `${height}px` } : {} });
  const words = el("figcaption", {}, caption || "");
  body.append(el("figure", { role: "group", "aria-label": label }, node, words));
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  function redraw() {
    const ink = color("ink"), soft = color("soft"), line = color("line");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: soft, size: 12 }, automargin: true, fixedrange: true };
    const { traces, layout } = draw({ ink, soft, line, ground: color("sheet"), raised: color("raised"), series: (n) => color(`series-${(n % 8) + 1}`), error: color("error"), axis });
    const whole = {
      margin: { l: 48, r: 12, t: 8, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink }, showlegend: false,
      hoverlabel: { bgcolor: color("raised"), bordercolor: line, font: { color: ink, size: 13 }, align: "left", namelength: -1 },
      transition: { duration: still ? 0 : 200 }, ...layout };
    Plotly.react(node, traces, whole, { displayModeBar: false, responsive: true, showTips: false, doubleClick: false });
    node.querySelectorAll("svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
  }
  if (!isLater) redraw();
  if (onclick) node.on("plotly_click", onclick);
  Page.onTheme(redraw);
  return { node, redraw, say: (text) => { words.textContent = text; } };
};

// A treemap of what names separated by dots lie in, with the same as a list that keys reach.
// total: how many leaves; path(i) -> [names from the root]; measures: [{name, of(i) -> number, show(number, sums) -> text}];
// A measure without show is no choice: it is there for tone(sums) -> name of a color, by which tiles are filled.
// leaf(i): when one is chosen; about(names) -> what there is to say of such a module, or nothing.
Page.treemap = (() => {
  const { el, announce, count } = Page;
  const mostTiles = 500; // at once: more are too small to see, and too slow to draw
  const mostSiblings = 200; // below one node
  const groupOf = 100; // of more
  const mostLevels = 64; // of a name, which may be all dots: below them it is one
  const mostCrumbs = 12;
  const deepest = 5; // levels below the root that tiles show

  // A tree of {name, kids: Map, leaf, sums}, with chains of single names joined.
  function grow(total, path, measures) {
    const root = { name: "", kids: new Map(), leaf: null, sums: measures.map(() => 0), leaves: 0 };
    for (let i = 0; i < total; i++) {
      const figures = measures.map((measure) => measure.of(i));
      let node = root;
      const names = path(i);
      if (names.length > mostLevels) names.push(names.splice(mostLevels).join("."));
      for (let n = 0; ; n++) {
        node.leaves++;
        figures.forEach((figure, m) => { node.sums[m] += figure; });
        if (n === names.length) break;
        let kid = node.kids.get(names[n]);
        if (!kid) {
          kid = { name: names[n], kids: new Map(), leaf: null, sums: measures.map(() => 0), leaves: 0, parent: node };
          node.kids.set(names[n], kid);
        }
        node = kid;
      }
      if (node.leaf === null) node.leaf = i;
    }
    gather(root, measures);
    return root;
  }

  // Of very many siblings those that stand next to one another become groups, until no node has more than can be told apart.
  function gather(node, measures) {
    node.kids.forEach((kid) => gather(kid, measures));
    split(node, measures);
  }
  function split(node, measures) {
    const kids = [...node.kids.values()];
    if (kids.length <= mostSiblings) return;
    const each = groupOf ** Math.ceil(Math.log(kids.length) / Math.log(groupOf) - 1 - 1e-9);
    node.kids = new Map();
    for (let from = 0; from < kids.length; from += each) {
      const part = kids.slice(from, from + each);
      const group = { name: part.length > 1 ? `${Page.cut(part[0].name, 40)} \u2026 ${Page.cut(part[part.length - 1].name, 40)}` : part[0].name, isGroup: true, leaf: null, parent: node,
        kids: new Map(part.map((kid, n) => [n, kid])), leaves: part.reduce((sum, kid) => sum + kid.leaves, 0), sums: measures.map((_, m) => part.reduce((sum, kid) => sum + kid.sums[m], 0)) };
      part.forEach((kid) => { kid.parent = group; });
      node.kids.set(from, group);
      split(group, measures);
    }
  }

  return function treemap(body, { label, rootName, total, path, measures, leaf, about, tone }) {
    const root = grow(total, path, measures);
    const shown = [...measures.keys()].filter((m) => measures[m].show && (root.sums[m] || !m));
    let at = root, measure = 0;
    const crumbs = el("ol", { class: "crumbs" });
    const left = el("div", {}), inside = el("ul", { class: "inside", "aria-label": "What is in it" });
    body.append(
      el("div", { class: "tools" }, el("nav", { class: "grow", "aria-label": "Where the map is" }, crumbs),
        shown.length > 1 && Page.choice("Measure", shown.map((m) => [m, measures[m].name]), measure, (m) => { measure = m; show(); })),
      el("div", { class: "map" }, left, inside));
    let drawn = [];
    const value = (node) => node.sums[measure];
    const inOrder = new Intl.Collator("en", { numeric: true }).compare;
    const kidsOf = (node) => [...node.kids.values()].sort((a, b) => value(b) - value(a) || inOrder(a.name, b.name));

    // The tiles below a node: the largest first, as many as can be seen; what is left is one tile in each.
    function tiles(top) {
      const ids = [""], nodes = [top], parents = [""];
      const queue = [[top, 0, ""]];
      let room = mostTiles;
      while (queue.length && room > 0) {
        queue.sort((a, b) => value(b[0]) - value(a[0]));
        const [node, depth, id] = queue.shift();
        const kids = kidsOf(node).filter((kid) => value(kid) > 0);
        const least = value(top) / 4000;
        let fit = kids.filter((kid) => value(kid) >= least).slice(0, Math.max(1, Math.min(room, mostSiblings)));
        if (fit.length === kids.length - 1) fit = kids;
        fit.forEach((kid, n) => {
          const own = `${id}/${n}`;
          ids.push(own); nodes.push(kid); parents.push(id);
          if (kid.kids.size && depth + 1 < deepest) queue.push([kid, depth + 1, own]);
        });
        room -= fit.length;
        const rest = kids.slice(fit.length);
        if (rest.length) {
          ids.push(`${id}/rest`); parents.push(id);
          nodes.push({ name: `and ${count(rest.length)} more`, isRest: true, kids: new Map(), sums: measures.map((_, m) => rest.reduce((sum, kid) => sum + kid.sums[m], 0)), parent: node, leaves: 0 });
        }
      }
      return { ids, nodes, parents };
    }

    const share = (node) => (value(root) ? `${Number(((100 * value(node)) / value(root)).toPrecision(3))} %` : "none");
    const text = (node) => measures[measure].show(value(node), node.sums);
    const nameOf = (node) => node.name || (node === root ? rootName : "(no name)");
    // Down to where there is more than one thing.
    const single = (node) => {
      const [kid] = node.kids.values();
      return node.kids.size === 1 && node.leaf === null && kid.kids.size ? single(kid) : node;
    };
    const namesOf = (node) => (node === root ? [] : [...namesOf(node.parent), ...(node.isGroup && node !== at ? [] : [node.name])]);
    const fullName = (node) => namesOf(node).join(".") || rootName;

    const chart = Page.chart(left, {
      label: `${label}; the list beside it has the same`, isLater: true,
      draw: (colors) => {
        const { ids, nodes, parents } = tiles(at);
        drawn = nodes;
        const stem = single(at), order = new Map(kidsOf(stem).map((kid, n) => [kid, n]));
        const fill = (node) => {
          let top = node, depth = 0;
          for (; top.parent && top.parent !== stem; top = top.parent) depth++;
          if (!order.has(top)) return colors.raised;
          return Page.mixed(tone ? Page.color(tone(node.sums)) : colors.series(order.get(top)), colors.ground, node.kids.size || node.isRest ? 0.72 - 0.07 * Math.min(depth, 2) : 0);
        };
        const isLight = (node) => node.kids.size || node.isRest || node === at;
        return {
          traces: [{
            type: "treemap", ids, parents, branchvalues: "total", values: nodes.map(value), sort: false,
            labels: nodes.map((node) => Page.inert(node === at ? nameOf(node) : node.name || "(no name)")),
            text: nodes.map((node) => Page.inert(text(node))), textinfo: "label+text",
            hovertext: nodes.map((node) => `${Page.inert(fullName(node))}<br>${Page.inert(text(node))}, ${share(node)}${node.leaves > 1 ? `, ${Page.countOf(node.leaves, "tensor")}` : ""}`),
            hoverinfo: "text", maxdepth: deepest + 1, pathbar: { visible: false }, tiling: { pad: 2, packing: "squarify" },
            marker: { colors: nodes.map(fill), line: { color: colors.ground, width: 0.5 }, pad: { t: 20, l: 3, r: 3, b: 3 }, cornerradius: 3 },
            insidetextfont: { color: nodes.map((node) => (isLight(node) ? colors.ink : colors.ground)), size: 12 }, textfont: { size: 12 }, opacity: 1,
          }],
          layout: { margin: { l: 0, r: 0, t: 0, b: 0 }, transition: { duration: 0 }, uniformtext: { minsize: 9, mode: "hide" } },
        };
      },
    });
    function go(node) {
      if (!node.kids.size) { if (node.leaf !== null && leaf) leaf(node.leaf); return; }
      at = single(node);
      show();
      announce(`${Page.cut(fullName(at), 200)}: ${text(at)}`);
    }

    function show() {
      const way = [];
      for (let node = at; node; node = node.parent) way.unshift(node);
      const deep = way.length > mostCrumbs; // the first, and the last
      crumbs.replaceChildren(...(deep ? [way[0], null, ...way.slice(2 - mostCrumbs)] : way).map((node) => el("li", {}, !node ? "\u2026" : node === at
        ? el("span", { "aria-current": "true" }, Page.cut(nameOf(node), 200))
        : el("button", { type: "button", class: "quiet", onclick: () => { up(node); } }, Page.cut(nameOf(node), 200)))));
      const kids = kidsOf(at), most = value(at) || 1;
      inside.replaceChildren(...kids.map((kid, n) => el("li", {}, el("button", { type: "button", class: "row", onclick: () => go(kid) },
        el("span", { class: "name" }, Page.cut(kid.name || "(no name)", 200)), el("span", { class: "value" }, text(kid)),
        el("span", { class: "share" }, el("i", { style: { width: `${(100 * value(kid)) / most}%`, background: `var(--${tone ? tone(kid.sums) : `series-${(n % 8) + 1}`})` } }))))));
      const told = about && about(namesOf(at));
      chart.say(`${Page.cut(fullName(at), 200)}: ${text(at)}${at === root ? "" : `, ${share(at)} of all`}${told ? `, ${Page.cut(told, 200)}` : ""}. Choose a tile or a line to go into it.`);
      chart.redraw();
    }
    function up(node) { at = node; show(); const first = inside.querySelector("button"); if (first) first.focus(); }
    body.addEventListener("keydown", (event) => {
      if ((event.key === "Escape" || event.key === "Backspace") && at.parent && event.target.tagName !== "INPUT") { event.preventDefault(); up(at.parent); }
    });
    at = single(root);
    show();
    chart.node.on("plotly_treemapclick", (event) => {
      const node = drawn[event.points[0].pointNumber];
      if (node && node !== at) go(node.isRest ? node.parent : node);
      else if (at.parent) go(at.parent);
      return false;
    });

    return { go, at: () => at };
  };
})();
