// The endpoints of openapi.json, each with its fields. Text goes in as text; nothing is loaded from elsewhere.

/** An element with text or children. */
function h(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const nameOf = (schema) => schema.$ref.split("/").pop();
const idOf = (method, path) => `${method}-${path.replace(/\W+/g, "-")}`;

/** What a value may be, in words: types, choices, and models by name, which `models` collects. */
function typeOf(schema, models) {
  if (schema.$ref) {
    models.add(nameOf(schema));
    return nameOf(schema);
  }
  const branches = schema.anyOf || schema.oneOf;
  if (branches) return branches.map((branch) => typeOf(branch, models)).filter((t) => t !== "null").join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.format === "binary") return "file";
  if (schema.type === "array") return `list of ${schema.items ? typeOf(schema.items, models) : "anything"}`;
  if (schema.type === "object" && schema.additionalProperties instanceof Object)
    return `object of ${typeOf(schema.additionalProperties, models)}`;
  return schema.type || "anything";
}

const LIMITS = {
  minimum: (n) => `at least ${n}`, exclusiveMinimum: (n) => `above ${n}`,
  maximum: (n) => `at most ${n}`, exclusiveMaximum: (n) => `below ${n}`,
  minLength: (n) => `length at least ${n}`, maxLength: (n) => `length at most ${n}`,
  minItems: (n) => `items: at least ${n}`, maxItems: (n) => `items: at most ${n}`,
  pattern: (text) => `matches ${text}`,
};

/** The bounds of a value, of its branches and of its items. */
function limitsOf(schema) {
  const parts = [schema, ...(schema.anyOf || schema.oneOf || [])].flatMap((part) => [part, part.items || {}]);
  // JavaScript rounds the ends of 64 bits: rather none than a wrong one.
  const said = (key, part) => key in part && (typeof part[key] !== "number" || Math.abs(part[key]) < 2 ** 53);
  const found = parts.flatMap((part) => Object.keys(LIMITS).filter((key) => said(key, part)).map((key) => LIMITS[key](part[key])));
  return [...new Set(found)].join(", ");
}

/** A table of a model's fields; the models they hold are added to `models`. */
function fieldsOf(schema, models) {
  const table = h("table", "", h("tr", "", h("th", "", "field"), h("th", "", "value"), h("th", "", "notes")));
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const must = (schema.required || []).includes(name);
    const label = h("code", must ? "must" : "", name);
    const notes = [limitsOf(field), field.description].filter(Boolean).join(". ");
    table.append(h("tr", "", h("td", "", label), h("td", "", typeOf(field, models)), h("td", "soft", notes)));
  }
  return table;
}

/** The fields of a body and, folded under them, of the models it is made of, each once. */
function bodyOf(schema, schemas) {
  const models = new Set();
  const box = h("div", "", fieldsOf(schema, models));
  for (const model of models) {
    const about = h("p", "soft", schemas[model].description || "");
    box.append(h("details", "", h("summary", "", model), about, fieldsOf(schemas[model], models)));
  }
  return box;
}

/** The least body that a model takes. */
function exampleOf(schema, schemas) {
  if (schema.$ref) return exampleOf(schemas[nameOf(schema)], schemas);
  if (schema.anyOf || schema.oneOf) return exampleOf((schema.anyOf || schema.oneOf)[0], schemas);
  if ("const" in schema) return schema.const;
  if (schema.enum) return schema.enum.includes("user") ? "user" : schema.enum[0];
  if (schema.type === "array") return [exampleOf(schema.items || {}, schemas)];
  if (schema.type === "integer" || schema.type === "number") return 16;
  if (schema.type !== "object") return "Hello!";
  const names = [...(schema.required || [])];
  if (schema.properties?.content && !names.includes("content")) names.push("content");
  return Object.fromEntries(names.map((name) => [name, exampleOf(schema.properties[name], schemas)]));
}

/** A command that calls the endpoint with the least body. */
function curlOf(method, path, content, schemas) {
  const call = `curl ${method === "delete" ? "-X DELETE " : ""}${location.origin}${path}`;
  if (content["multipart/form-data"]) return `${call} \\\n  -F file=@notes.txt`;
  if (!content["application/json"]) return call;
  const body = JSON.stringify(exampleOf(content["application/json"].schema, schemas)).replaceAll("'", "'\\''");
  return `${call} -H "Content-Type: application/json" \\\n  -d '${body}'`;
}

function sectionOf(method, path, operation, schemas) {
  const title = h("h2", "", h("span", "method", method.toUpperCase()), h("code", "", path));
  const section = h("section", "", title, h("p", "", operation.summary || ""));
  section.id = idOf(method, path);
  const content = operation.requestBody?.content || {};
  const example = h("pre", "", curlOf(method, path, content, schemas));
  example.tabIndex = 0; // wider than a phone: to be scrolled by keys too
  section.append(example);
  for (const { schema } of Object.values(content))
    section.append(bodyOf(schema.$ref ? schemas[nameOf(schema)] : schema, schemas));
  const statuses = Object.entries(operation.responses || {}).filter(([status]) => status !== "200" && status !== "422");
  if (statuses.length) {
    const table = h("table", "");
    for (const [status, answer] of statuses)
      table.append(h("tr", "", h("td", "", status), h("td", "", answer.description || "")));
    section.append(h("details", "", h("summary", "", "errors"), table));
  }
  return section;
}

const answer = await fetch("../openapi.json");
const { info, paths, components } = await answer.json();
document.getElementById("about").prepend(`${info.title} ${info.version}. `);
const list = h("ul", "");
for (const [path, methods] of Object.entries(paths))
  for (const [method, operation] of Object.entries(methods)) {
    document.getElementById("endpoints").append(sectionOf(method, path, operation, components.schemas));
    const link = h("a", "", h("span", "soft", method.toUpperCase()), ` ${path}`);
    link.href = `#${idOf(method, path)}`;
    list.append(h("li", "", link));
  }
document.getElementById("contents").append(list);
document.documentElement.dataset.ready = "";
