// The frame of every page, and what its parts are made of.  Texts of a checkpoint's become text nodes, and nothing else.
"use strict";

const Page = (() => {
  const root = document.documentElement;
  const elements = (name) => document.querySelectorAll(`script[data-name="${name}"]`);
  const data = (name, number = 0) => JSON.parse(elements(name)[number].textContent);
  const howMany = (name) => elements(name).length;

  // An element: its attributes (`on...` are functions; null and false: none), and its children, of which texts stay texts.
  function el(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(made.style, value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return made;
  }

  // Figures as people read them, as the command line does.
  function size(nbytes) {
    let value = nbytes;
    for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
      if (value < 999.5 || unit === "TB") return unit === "B" ? `${nbytes} B` : `${Number(value.toPrecision(3))} ${unit}`;
      value /= 1000;
    }
  }
  function short(number) {
    for (const [unit, one] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]])
      if (number >= 0.9995 * one) return `${Number((number / one).toPrecision(3))} ${unit}`;
    return String(number);
  }
  const count = (number) => number.toLocaleString("en-US");
  function figure(value, mostWhole = 1e7) {
    if (typeof value !== "number") return value === null || value === undefined ? "" : String(value);
    if (Number.isInteger(value) && Math.abs(value) < mostWhole) return count(value);
    const most = Math.abs(value);
    return most >= 1e-3 && most < 1e6 ? String(Number(value.toPrecision(4))) : Number(value.toPrecision(4)).toExponential().replace("e+", "e");
  }
  // The same, with whole numbers whole however large: where there is room.
  const whole = (value) => figure(value, Infinity);
  const countOf = (number, thing) => `${count(number)} ${thing}${number === 1 ? "" : "s"}`;
  // The beginning and the end of a long text.
  const cut = (text, most) => (text.length <= most ? text : `${text.slice(0, most - Math.floor(most / 3) - 1)}\u2026${text.slice(-Math.floor(most / 3))}`);

  // What a screen reader is told.
  const live = el("div", { class: "hidden", role: "status", "aria-live": "polite" });
  const announce = (text) => { live.textContent = text; };

  // Light or dark, as the system has it until somebody chooses.
  const media = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (media.matches ? "dark" : "light")) === "dark";
  const redraws = [];
  const onTheme = (redraw) => redraws.push(redraw);
  media.addEventListener("change", () => redraws.forEach((redraw) => redraw()));
  function color(name) {
    const probe = el("i", { style: { color: `var(--${name})` } });
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }
  // A color so far (0 to 1) on the way to another, both as the browser tells them: "rgb(1, 2, 3)".
  function mixed(one, other, share) {
    const [a, b] = [one, other].map((text) => text.match(/[\d.]+/g).map(Number));
    return `rgb(${[0, 1, 2].map((n) => Math.round(a[n] + (b[n] - a[n]) * share)).join(", ")})`;
  }
  // On paper it is light.
  let shownTheme;
  function printed(isPrinting) {
    if (isPrinting) shownTheme = root.dataset.theme || "";
    root.dataset.theme = isPrinting ? "light" : shownTheme;
    redraws.forEach((redraw) => redraw());
  }
  addEventListener("beforeprint", () => printed(true));
  addEventListener("afterprint", () => printed(false));
  function themeButton() {
    const label = () => (isDark() ? "Light" : "Dark");
    const button = el("button", { type: "button", class: "theme", onclick: () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      button.textContent = label();
      redraws.forEach((redraw) => redraw());
    } }, label());
    button.setAttribute("aria-label", "Switch between light and dark");
    return button;
  }

  // The frame: a bar with links to the parts, and the parts.
  const nav = el("nav", { "aria-label": "Parts of this page" });
  const main = el("main", { id: "main", tabindex: "-1" });
  document.getElementById("page").append(
    el("a", { class: "skip", href: "#main" }, "Skip to the content"),
    el("header", { class: "bar" }, el("div", { class: "brand" }, "ckptkit"), nav, themeButton()), main, live);

  // What the page is about: {path, sentence, badges: [{text, tone, title}], figures: [{label, value, note}], facts: [[label, text]]}.
  function header(told, into = main) {
    const at = told.path.lastIndexOf("/", told.path.length - 2) + 1;
    const made = el("div", { class: "top" },
      el("div", { class: "folder" }, cut(told.path.slice(0, at), 400)),
      el("h1", {}, cut(told.path.slice(at), 400)),
      told.sentence && el("p", { class: "sentence" }, `${told.sentence[0].toUpperCase()}${told.sentence.slice(1)}.`),
      el("div", { class: "badges" }, (told.badges || []).map((badge) =>
        el("span", { class: `badge ${badge.tone || ""}`, title: badge.title }, badge.text))));
    if (told.figures && told.figures.length)
      made.append(el("dl", { class: "figures" }, told.figures.map((each) =>
        el("div", {}, el("dt", {}, each.label), el("dd", {}, each.value, " ", each.note && el("small", {}, each.note))))));
    if (told.facts && told.facts.length) made.append(facts(told.facts));
    into.append(made);
    return made;
  }
  const facts = (pairs) => el("dl", { class: "facts" }, pairs.map(([label, text]) => [el("dt", {}, label), el("dd", {}, text)]));

  // A part with a heading and a link in the bar; its body is given back.
  function part(title, { id, note } = {}, into = main) {
    const body = el("div", { class: "body" });
    const name = id || title.toLowerCase().replace(/[^a-z]+/g, "-");
    into.append(el("section", { class: "part", id: name, "aria-labelledby": `${name}-title` },
      el("header", {}, el("h2", { id: `${name}-title` }, title), note && el("span", { class: "note" }, note)), body));
    link(title, name);
    return body;
  }
  const link = (title, name) => nav.append(el("a", { href: `#${name}` }, title));
  // What follows is in the place of what was shown: its links and charts are gone.
  function again() {
    nav.replaceChildren();
    redraws.length = 0;
  }

  // A command with a button that copies it.
  function copyable(text) {
    const button = el("button", { type: "button", "aria-label": `Copy: ${cut(text, 200)}`, onclick: async () => {
      button.textContent = (await copied(text)) ? "Copied" : "Select it";
      announce(button.textContent);
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } }, "Copy");
    return el("div", { class: "copyable" }, el("code", { class: text.startsWith("ckptkit ") && "shell" },
      text.split(/(\s+)/).map((word) => (word.trim() ? el("span", { class: "word" }, word) : word))), button);
  }
  async function copied(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const field = el("textarea", { class: "hidden" });
      field.value = text;
      document.body.append(field);
      field.select();
      const done = document.execCommand("copy");
      field.remove();
      return done;
    }
  }

  // A sentence, of which what stands between backticks is code.
  const sentence = (text) => text.split(/`([^`]*)`/).map((part, n) => (n % 2 ? el("code", {}, part) : part));

  // Findings, most severe first: [{severity, code, message, fix, where, told: [[label, text]]}];
  // what codes mean: {code: {title, meaning, remedy}};
  // combined: {title, command, keeps} of the one that does all that they advise, or null.
  const mostFindings = 200;
  function findings(body, found, meanings, combined) {
    if (combined)
      body.append(el("div", { class: "combined" }, el("strong", {}, combined.title),
        copyable(combined.command), el("p", {}, `${combined.keeps[0].toUpperCase()}${combined.keeps.slice(1)}`)));
    const list = el("ul", { class: "findings" });
    const add = (from) => {
      for (const each of found.slice(from, from + mostFindings)) {
        const known = meanings[each.code];
        list.append(el("li", { class: each.severity },
          el("div", { class: "head" }, el("span", { class: "severity" }, each.severity),
            known && el("strong", {}, known.title), el("span", { class: "code" }, each.code)),
          each.where && el("div", { class: "where" }, each.where),
          el("div", { class: "message" }, sentence(each.message)),
          each.told && each.told.length && facts(each.told),
          each.fix && copyable(each.fix),
          known && el("details", {}, el("summary", {}, "What it means"), el("p", {}, sentence(known.meaning)),
            known.remedy !== "-" && el("p", {}, sentence(known.remedy)))));
      }
      const left = found.length - from - mostFindings;
      if (left > 0)
        list.append(el("li", { class: "more" }, el("button", { type: "button", onclick: (event) => {
          event.target.closest("li").remove();
          add(from + mostFindings);
        } }, `and ${count(left)} more`)));
    };
    add(0);
    body.append(list);
  }

  // Buttons of which one is pressed: [[value, label]].
  function choice(label, values, chosen, onchoose) {
    const made = el("div", { class: "switch", role: "group", "aria-label": label });
    for (const [value, text] of values)
      made.append(el("button", { type: "button", "aria-pressed": String(value === chosen), onclick: (event) => {
        for (const each of made.children) each.setAttribute("aria-pressed", String(each === event.currentTarget));
        onchoose(value);
      } }, text));
    return made;
  }

  return { announce, again, choice, color, copyable, count, countOf, cut, data, el, facts, figure, findings, header, howMany, isDark,
    link, main, mixed, onTheme, part, sentence, short, size, whole };
})();
