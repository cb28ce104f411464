// Where the nodes and edges of a graph go: layers from a depth-first search, few crossings, loops below.
// What is inside of a subgraph is laid out first; then it is a box of that size.

const NODE = { least: 134, most: 190, height: 50, aside: 48, letter: 7.6 };
const END = 20;
const GAP = { along: 26, across: 22, loop: 14 };
/** Between a frame and what is in it; its name stands above. */
const FRAME = { top: 34, bottom: 16, least: 200 };
/** How far below a node its loop to itself runs. */
const SELF = 15;
const INSIDE = ":";

/** Where edges come into a frame and leave it. */
const IN = "__start__";
const OUT = "__end__";

/**
 * The nodes as a tree: what is inside of a subgraph hangs under it, as `children`.
 * A node's `key` is the path by which the lines of a run name it.
 */
export function grow(nodes) {
  const root = { id: "", children: [] };
  const known = new Map([["", root]]);
  const find = (id, more) => {
    if (known.has(id)) return Object.assign(known.get(id), more);
    const [parent, name] = split(id);
    const made = { id, key: id.replaceAll(INSIDE, "/"), label: name, children: [], ...more };
    known.set(id, made);
    const above = find(parent);
    // A subgraph's own start and end are where edges cross its frame.
    if (above === root || !isTerminus(name)) above.children.push(made);
    return made;
  };
  for (const node of nodes) find(node.id, node);
  return root;
}

function split(id) {
  const at = id.lastIndexOf(INSIDE);
  return [id.slice(0, Math.max(at, 0)), id.slice(at + 1)];
}

/** How many levels of subgraphs are inside. */
export const depthOf = ({ children }) =>
  Math.max(0, ...children.filter((child) => child.children.length).map((child) => 1 + depthOf(child)));

/** Whether an edge leads to each node. LangGraph does not know of all: a node's code may say where it goes. */
export function entered({ id, children }, edges) {
  if (children.length) return children.every((child) => entered(child, edges));
  return isTerminus(id) || edges.some(({ source, target }) => target === id && source !== id);
}

/**
 * Places what is inside of `parent` and `edges` ({source, target, conditional}) from left to right.
 * `isOpen` says of which subgraphs the inside is shown. Gives `{ nodes: [{…, x, y, width, height}],
 * edges: [{…, points}], width, height, axis, entered }`: x and y are upper left corners, an edge's points
 * are joined by curves, `axis` is the height at which edges come and go, `entered` whether one comes in.
 * The node of an open subgraph has what is in it as `inside`, which begins `y` below its upper edge.
 */
export function layout(parent, edges, isOpen) {
  const boxes = parent.children.map((node) => measure(node, edges, isOpen));
  const doors = (id) => (parent.id ? [{ id, width: 0, height: 0, axis: 0 }] : []);
  const places = new Map([...doors(IN), ...boxes, ...doors(OUT)].map((place) => [place.id, place]));
  const own = between(parent, edges, places);
  const back = loops([...places.keys()], own);
  const forward = own.filter((edge) => !back.has(edge));

  rank(places, forward, own.length === 0);
  const chains = chain(places, forward);
  const layers = order(places, chains);
  const size = place(layers, parent.id ? FRAME.least : 0);
  return finish(layers, chains, [...back], places, size);
}

const isTerminus = (name) => name === IN || name === OUT;

/** A node's box: `axis` is where its edges are. */
function measure(node, edges, isOpen) {
  if (node.children.length && isOpen(node)) {
    const inside = layout(node, edges, isOpen);
    return {
      id: node.id, width: inside.width, height: FRAME.top + inside.height + FRAME.bottom,
      axis: FRAME.top + inside.axis, node: { ...node, inside: { ...inside, y: FRAME.top } },
    };
  }
  if (isTerminus(node.id)) return { id: node.id, node, width: END, height: END, axis: END / 2 };
  const folds = node.children.length ? 20 : 0;
  const wanted = NODE.aside + node.label.length * NODE.letter + folds;
  const width = Math.min(NODE.most, Math.max(NODE.least + folds, Math.ceil(wanted)));
  return { id: node.id, node, width, height: NODE.height, axis: NODE.height / 2 };
}

/** The edges between what is directly in `parent`; those through its frame lead to a door in it. */
function between(parent, edges, places) {
  const found = new Map();
  const before = parent.id ? parent.id + INSIDE : "";
  // The child that holds a node, the door that it is, or null for a node that is elsewhere.
  const childOf = (id) => {
    if (!id.startsWith(before)) return null;
    const name = id.slice(before.length).split(INSIDE)[0];
    return parent.id && isTerminus(name) ? name : before + name;
  };
  for (const { source, target, ...more } of edges) {
    const [from, to] = [childOf(source) ?? IN, childOf(target) ?? OUT];
    const within = from === to && source !== from; // it is drawn inside of the child
    if (within || from === OUT || to === IN || (parent.id && from === IN && to === OUT)) continue;
    if (!places.has(from) || !places.has(to)) continue;
    const same = found.get(`${from}\n${to}`);
    if (same) same.conditional &&= more.conditional;
    else found.set(`${from}\n${to}`, { ...more, source: from, target: to });
  }
  return [...found.values()];
}

/** The edges that close a loop. */
function loops(ids, edges) {
  const out = new Map(ids.map((id) => [id, edges.filter((edge) => edge.source === id)]));
  const state = new Map();
  const back = new Set();
  const visit = (id) => {
    state.set(id, "open");
    for (const edge of out.get(id)) {
      if (state.get(edge.target) === "open") back.add(edge);
      else if (!state.has(edge.target)) visit(edge.target);
    }
    state.set(id, "closed");
  };
  const entered = new Set(edges.filter((e) => e.source !== e.target).map((e) => e.target));
  for (const id of [...ids.filter((id) => !entered.has(id)), ...ids]) {
    if (!state.has(id)) visit(id);
  }
  return back;
}

/** Each node one layer behind the last of those that lead to it. */
function rank(places, edges, unknown) {
  let index = 0;
  const first = places.has(IN) ? 1 : 0;
  for (const place of places.values()) {
    if (unknown) place.layer = place.id === OUT ? 0 : index++;
    else place.layer = place.id === IN ? 0 : first;
  }
  for (let round = 0, moved = true; moved && round <= places.size; round++) {
    moved = false;
    for (const { source, target } of edges) {
      const least = places.get(source).layer + 1;
      if (places.get(target).layer < least) {
        places.get(target).layer = least;
        moved = true;
      }
    }
  }
  const others = [...places.values()].filter((place) => place.id !== OUT);
  if (places.has(OUT)) places.get(OUT).layer = Math.max(0, ...others.map((place) => place.layer + 1));
}

/** Edges over several layers get a thin stand-in in each layer between, which keeps nodes away. */
function chain(places, edges) {
  let count = 0;
  return edges.map((edge) => {
    const from = places.get(edge.source);
    const to = places.get(edge.target);
    const stops = [from];
    for (let layer = from.layer + 1; layer < to.layer; layer++) {
      const thin = { id: `thin ${count++}`, layer, width: 0, height: 12, axis: 6, thin: true };
      places.set(thin.id, thin);
      stops.push(thin);
    }
    return { edge, stops: [...stops, to] };
  });
}

/** Layers whose places stand by the middle of their neighbours, sweeping to and fro. */
function order(places, chains) {
  const layers = [];
  for (const place of places.values()) (layers[place.layer] ??= []).push(place);
  const before = new Map();
  const behind = new Map();
  for (const { stops } of chains) {
    stops.slice(1).forEach((stop, index) => {
      push(before, stop, stops[index]);
      push(behind, stops[index], stop);
    });
  }
  layers.forEach((layer) => layer.forEach((place, index) => (place.at = index)));
  for (let sweep = 0; sweep < 8; sweep++) {
    const [neighbours, path] = sweep % 2 ? [behind, layers.toReversed()] : [before, layers];
    for (const layer of path) {
      for (const place of layer) {
        const near = neighbours.get(place);
        place.pull = near ? near.reduce((sum, other) => sum + other.at, 0) / near.length : place.at;
      }
      layer.sort((a, b) => a.pull - b.pull);
      layer.forEach((place, index) => (place.at = index));
    }
  }
  return layers;
}

const push = (map, key, value) => map.set(key, [...(map.get(key) ?? []), value]);

/** Layers stand around one axis: a layer of one by where its edges are, so that they go straight. */
function place(layers, least) {
  const columns = layers.map((layer) => {
    const height = layer.reduce((sum, place) => sum + place.height + GAP.across, -GAP.across);
    return { layer, height, above: layer.length === 1 ? layer[0].axis : height / 2 };
  });
  const axis = Math.max(0, ...columns.map(({ above }) => above));
  const below = Math.max(0, ...columns.map(({ height, above }) => height - above));
  const widths = layers.map((layer) => Math.max(...layer.map((place) => place.width)));
  const sum = widths.reduce((total, width) => total + width, 0);
  const gap = Math.max(GAP.along, (least - sum) / (layers.length - 1));
  let x = 0;
  for (const [index, { layer, above }] of columns.entries()) {
    const width = widths[index];
    let y = axis - above;
    for (const place of layer) {
      Object.assign(place, { x: x + (width - place.width) / 2, y, column: [x, x + width] });
      y += place.height + GAP.across;
    }
    x += width + gap;
  }
  return { width: Math.max(0, x - gap), height: axis + below, axis };
}

function finish(layers, chains, back, places, size) {
  // What leads through a frame has its tip where it ends.
  const through = (place) => !place.node || place.node.inside?.entered;
  const edges = chains.map(({ edge, stops }) =>
    ({ ...edge, points: points(stops), through: through(stops.at(-1)) }));
  let bottom = size.height;
  let lanes = 0;
  for (const edge of back) {
    const [from, to] = [places.get(edge.source), places.get(edge.target)];
    if (from !== to) lanes += 1;
    // A node's loop to itself hugs it; those that go back run one below the other.
    const y = from === to ? from.y + from.height + SELF : size.height + 4 + lanes * GAP.loop;
    const aside = from === to ? 16 : 4 + 10 * lanes;
    edges.push({ ...edge, loop: true, points: under(from, to, y, aside) });
    bottom = Math.max(bottom, y + 4);
  }
  // In the order in which they are read, and walked through with the keyboard.
  const nodes = layers.flat().filter((place) => place.node)
    .map(({ node, x, y, width, height }) => ({ ...node, x, y, width, height }));
  const entered = edges.some(({ source }) => source === IN);
  return { nodes, edges, width: size.width, height: bottom, axis: size.axis, entered };
}

const points = (stops) =>
  stops.flatMap(({ x, y, width, axis, column, thin }, index) =>
    thin ? [[column[0], y + axis], [column[1], y + axis]]
      : index === 0 ? [[x + width, y + axis]] : [[x, y + axis]]);

/** A loop leaves below, runs at `y`, and comes back from below; `aside` keeps those of one node apart. */
function under(from, to, y, aside) {
  const start = [from.x + from.width / 2 + aside, from.y + from.height];
  const end = [to.x + to.width / 2 - aside, to.y + to.height];
  return [start, [start[0], y], [end[0], y], end];
}

/** The points as the `d` of an SVG path. */
export function path({ points, loop }) {
  if (loop) {
    const [a, b, c, d] = points;
    const turn = Math.min(10, Math.abs(c[0] - b[0]) / 2);
    const side = c[0] < b[0] ? -turn : turn;
    return `M${a}V${b[1] - turn}q0,${turn} ${side},${turn}H${c[0] - side}q${side},0 ${side},${-turn}V${d[1] + 2}`;
  }
  let d = `M${points[0]}`;
  for (let index = 1; index < points.length; index++) {
    const [x0, y0] = points[index - 1];
    const [x1, y1] = points[index];
    const bend = (x1 - x0) / 2;
    d += `C${x0 + bend},${y0} ${x1 - bend},${y1} ${x1},${y1}`;
  }
  return d;
}
