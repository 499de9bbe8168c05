// Calls one function of a program: `node run.mjs PROGRAM ABILITY BASE_URL`, the case as JSON on standard input.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [program, ability, baseUrl] = process.argv.slice(2);
const functions = await import(pathToFileURL(program));
const answer = await functions[ability](baseUrl, JSON.parse(readFileSync(0, "utf8")));
console.log("\n" + JSON.stringify(answer));
process.exit(0);
